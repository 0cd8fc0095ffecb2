"""What pipelines run on: a cluster of three nodes, an MLflow server, disks that can fill up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.fault_toy import Toy, make_toy
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.ray_cluster import ray_cluster

DISK_KIB = 256 * 1024
MARK = "BUDGETDRAFT_SOAK"  # in the environment of all that a soak starts

# A name for each kind of pipeline, and what it has beside the toy's config: so that each part of the work
# takes long enough to be met at it.
KINDS: dict[str, tuple[str, ...]] = {
    "many γ": (f"sweep.gammas={[*range(1, 65)]}", "sweep.num_evaluators=2"),
    "two ranks": ("train.num_workers=2", "train.steps=80", "train.checkpoint_every=10"),
    "more text": (
        'data.sources=[{"kind": "text", "name": "stdlib", "files": ["stdlib"], "test_fraction": 0.2, '
        '"validation_fraction": 0.1}]',
    ),
}


@dataclass
class Ground:
    """All of it, up, below a folder."""

    folder: Path
    toy: Toy
    cluster: Any
    server: MlflowServer

    def options(self, kind: str, experiment: str) -> tuple[str, ...]:
        """Overrides of a pipeline of this kind that is mirrored into an experiment."""
        return (
            *KINDS[kind],
            f"run.ray_address={self.cluster.address}",
            "tracking.enabled=true",
            f"tracking.uri={self.server.uri}",
            f"tracking.experiment={experiment}",
        )

    @contextmanager
    def storage(self, name: str) -> Iterator[Path]:
        """A storage that is a file system of its own; its log lies beside it."""
        folder = self.folder / name
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_KIB}k", "tmpfs", str(folder)]
        subprocess.run(mount, check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def standing(folder: Path) -> Iterator[Ground]:
    """Everything started, and stopped afterwards."""
    served = folder / "server"
    served.mkdir()
    with ray_cluster(head_cpus=1, nodes=2) as cluster, MlflowServer(served) as server:
        yield Ground(folder, make_toy(folder), cluster, server)
