"""The points of one sweep in MLflow: a run for each, made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from filelock import FileLock

from jobs.sweep_points import axes, point_metrics
from jobs.tracking_store import OTHERS_S, Run, Store
from jobs.tracking_writer import Refused
from pipeline.rows import CellRow


class Sweep:
    """Which points of a sweep are in MLflow. `find` and `log` are for the writer's thread."""

    def __init__(
        self, store: Store, sweep_id: str, points: Mapping[str, Sequence[CellRow]], lock: FileLock
    ) -> None:
        self.store, self.sweep_id, self.points, self.lock = store, sweep_id, points, lock
        self.tags = {"stage": "cell", "sweep_id": sweep_id}
        self.measured = any(row.speedup is not None for cells in points.values() for row in cells)
        self.present: dict[str, str] | None = None  # key → run id

    def find(self) -> None:
        """Take the lock, so that no other process writes the same points, and look which are there."""
        if not self.lock.is_locked:
            self.lock.acquire(timeout=OTHERS_S)
        runs = self.store.whole(f"tags.sweep_id = '{self.sweep_id}' and tags.stage = 'cell'")
        self.present = {run.data.tags["cell_key"]: run.info.run_id for run in runs}

    def log(self, key: str, run: Run) -> None:
        """Write a point unless it is there."""
        if self.present is None:
            raise Refused("it is not known which points of the sweep are there")
        if key in self.present:
            return
        cells = self.points[key]
        self.store.make(run)
        self.store.log(run, axes(cells[0]), point_metrics(cells), run.began_ms)
        self.store.end(run, "FINISHED", run.began_ms)
        self.present[key] = run.id

    def best(self, most: int) -> list[str]:
        """Ids of the runs of the fastest points, or where none was measured of those accepted most."""
        present = self.present or {}
        value = {
            key: max(row.speedup or row.acceptance or 0.0 for row in self.points[key])
            for key in self.points
            if key in present
        }
        return [present[key] for key in sorted(value, key=lambda key: -value[key])[:most]]
