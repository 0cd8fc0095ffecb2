"""The faults of a soak. Each says whether it found something to break."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.store.layout import MANIFEST
from tests.faults.test_storage import flip
from tests.helpers.ray_cluster import join, lose
from tests.soak.ground import Ground

AWAY_S = 3.0  # how long an MLflow server is away
FILLER = "filler"  # the file that fills the disk
DAMAGE = "a damaged file"


@dataclass
class Attempt:
    """One start of a pipeline's command, and what faults may reach of it."""

    ground: Ground
    storage: Path
    driver: subprocess.Popen[str]
    chance: random.Random

    def kill_one(self, *titles: str) -> bool:
        """One of the cluster's workers whose title begins with one of these, if there is any."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if line and line[0].startswith(titles):
                    found.append(process)
        if found:
            with suppress(psutil.NoSuchProcess):
                self.chance.choice(found).kill()
        return bool(found)

    def end(self) -> None:
        """kill -9 of the driver."""
        with suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()


def task(attempt: Attempt) -> bool:
    return attempt.kill_one("ray::call")


def actor(attempt: Attempt) -> bool:
    return attempt.kill_one("ray::Worker")


def rank(attempt: Attempt) -> bool:
    return attempt.kill_one("ray::RayTrainWorker", "ray::_RayTrainWorker")


def node(attempt: Attempt) -> bool:
    """Another one joins in its place."""
    cluster = attempt.ground.cluster
    lose(cluster, attempt.chance.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id)))
    join(cluster)
    return True


def driver(attempt: Attempt) -> bool:
    alive = attempt.driver.poll() is None
    attempt.end()
    return alive


def terminate(attempt: Attempt) -> bool:
    alive = attempt.driver.poll() is None
    attempt.driver.terminate()
    return alive


def server(attempt: Attempt) -> bool:
    attempt.ground.server.kill()
    time.sleep(AWAY_S)
    attempt.ground.server.start()
    return True


def damage(attempt: Attempt) -> bool:
    """While nothing reads it: nobody can know of damage between a check and the reading."""
    files = [
        file
        for manifest in attempt.storage.glob(f"*/{MANIFEST}")
        for file in manifest.parent.rglob("*")
        if file.is_file() and file.stat().st_size and not file.name.startswith(".")
    ]
    if files:
        attempt.end()
        flip(attempt.chance.choice(sorted(files)))
    return bool(files)


def full_disk(attempt: Attempt) -> bool:
    """Nothing more goes onto it; `make_room` comes before the next attempt."""
    with (attempt.storage / FILLER).open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**20))
    return True


def make_room(storage: Path) -> None:
    (storage / FILLER).unlink(missing_ok=True)


FAULTS: dict[str, Callable[[Attempt], bool]] = {
    "kill -9 of a task": task,
    "kill -9 of an actor": actor,
    "kill -9 of a training rank": rank,
    "kill -9 of a node": node,
    "kill -9 of the driver": driver,
    "SIGTERM of the driver": terminate,
    "kill -9 of the MLflow server": server,
    DAMAGE: damage,
    "a full disk": full_disk,
}
