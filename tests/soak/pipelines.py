"""One pipeline of a soak: broken and started again until it is whole, then compared."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from tests.helpers.clock import patience
from tests.helpers.fault_toy import CLOCKED, log_of, missing, outcome, tail
from tests.soak.breaking import DAMAGE, FAULTS, Attempt, make_room
from tests.soak.ground import KINDS, Ground

EVERY_S = (20.0, 60.0)  # between two faults
LOOK_S = 0.5
MOST_ATTEMPTS = 40
LONGEST_S = 900.0  # of one attempt; what takes more hangs
DOCUMENTED = {0, 4, 143, -9}  # whole; a full disk, or what was given up; SIGTERM; our own kill -9


@dataclass
class Soak:
    """What came of it, as `soak.json` has it. Of each driver, the most bytes and open files."""

    seed: int
    minutes: float
    provenance: dict[str, Any]
    pipelines: int = 0
    whole: int = 0
    attempts: int = 0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    codes: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    unexpected: list[str] = field(default_factory=list)
    left_running: list[str] = field(default_factory=list)
    driver_bytes: list[int] = field(default_factory=list)
    driver_files: list[int] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.whole == self.pipelines and not (self.lost or self.unexpected or self.left_running)


class Chance(random.Random):
    """A seed's numbers, and when the next fault is due."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.wait()

    def wait(self) -> None:
        self.due = time.monotonic() + self.uniform(*EVERY_S)


class Pipelines:
    """Pipelines on one ground, one after another; what comes of them is counted in `soak`."""

    def __init__(self, ground: Ground, soak: Soak) -> None:
        self.ground, self.soak = ground, soak
        self.chance = Chance(soak.seed)
        self.expected: dict[str, tuple[dict[str, Any], dict[str, object]]] = {}

    def undisturbed(self) -> None:
        """Make what each kind is compared with: its files and rows, and its MLflow runs."""
        for kind in KINDS:
            name = f"undisturbed {kind}".replace(" ", "-")
            say(f"{kind}: undisturbed")
            with self.ground.storage(name) as storage:
                options = self.ground.options(kind, name)
                assert self.ground.toy.run(storage, *options, executor="ray") == 0, tail(storage)
                self.expected[kind] = outcome(storage), results_in_mlflow(self.ground.server.uri, name)
        self.chance.wait()

    def one(self) -> None:
        """A pipeline from nothing to what it should be."""
        self.soak.pipelines += 1
        kind, name = self.chance.choice(list(KINDS)), f"soak-{self.soak.pipelines}"
        with self.ground.storage(name) as storage:
            say(f"{name}: {kind}, its log is {log_of(storage)}")
            ended = self.bring_to_its_end(storage, self.ground.options(kind, name))
            files, runs = self.expected[kind]
            told = results_in_mlflow(self.ground.server.uri, name)
            lost = missing(outcome(storage), files) + missing(told, runs)
        self.soak.whole += ended and not lost
        self.soak.lost += lost
        say(f"{name}: {'whole' if ended else 'NOT whole'}, {lost} pieces lost, doubled or different")

    def bring_to_its_end(self, storage: Path, options: tuple[str, ...]) -> bool:
        """Start the command, break it, and start it again, until everything is done. Whether it is."""
        for _ in range(MOST_ATTEMPTS):
            make_room(storage)
            self.soak.attempts += 1
            driver = self.ground.toy.start(storage, *options, executor="ray")
            attempt, broken = Attempt(self.ground, storage, driver, self.chance), []
            for _ in self.watch(attempt):
                if time.monotonic() > self.chance.due:
                    broken.append(self.break_something(attempt))
                    self.chance.wait()
            code = driver.wait()
            self.soak.codes[str(code)] = self.soak.codes.get(str(code), 0) + 1
            if code not in DOCUMENTED or "\nTraceback" in tail(storage):
                self.soak.unexpected.append(f"{storage.name}: exit code {code} after {broken or 'nothing'}")
                say(f"exit code {code}; the last lines:\n{tail(storage)}")
            if code == 0 and DAMAGE not in broken:
                return True
        self.soak.unexpected.append(f"{storage.name} is not whole after {MOST_ATTEMPTS} attempts")
        return False

    def watch(self, attempt: Attempt) -> Iterator[None]:
        """A look now and then until the driver has ended; keeps its most memory and open files."""
        most_bytes = most_files = 0
        limit = patience(LONGEST_S)
        until = time.monotonic() + limit
        process = psutil.Process(attempt.driver.pid)
        while attempt.driver.poll() is None:
            if time.monotonic() > until:
                self.soak.unexpected.append(f"{attempt.storage.name} did not end in {limit:.0f} s")
                attempt.end()
            yield
            try:
                most_bytes = max(most_bytes, process.memory_info().rss)
                most_files = max(most_files, process.num_fds())
            except psutil.Error:
                break
            time.sleep(LOOK_S)
        self.soak.driver_bytes.append(most_bytes)
        self.soak.driver_files.append(most_files)

    def break_something(self, attempt: Attempt) -> str:
        """The first fault, in a random order, that finds something to break."""
        for name in self.chance.sample(list(FAULTS), len(FAULTS)):
            if FAULTS[name](attempt):
                self.soak.faults[name] += 1
                say(f"  {name}")
                return name
        raise AssertionError("a driver can always be killed")


def results_in_mlflow(uri: str, experiment: str) -> dict[str, Any]:
    """Curves and points of a sweep by name, with their metrics; what is there twice or open is a piece too.

    Every start of a pipeline has a run of its own; results are mirrored once, by the start that made them.
    """
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    pieces: dict[str, Any] = {}
    for run in client.search_runs([found.experiment_id], max_results=5000):
        stage, name = run.data.tags["stage"], run.info.run_name
        if run.info.status == "RUNNING":
            pieces[f"{stage} {name} {run.info.run_id} is left open"] = True
        if stage not in ("curves", "cell") or run.info.status != "FINISHED":
            continue
        piece = f"{stage} {name}" + f" again: {run.info.run_id}" * (f"{stage} {name}" in pieces)
        pieces[piece] = {
            f"{metric} at {point.step}": point.value
            for metric in run.data.metrics
            if metric not in CLOCKED and not metric.startswith("speed/")
            for point in client.get_metric_history(run.info.run_id, metric)
        }
    return pieces


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
