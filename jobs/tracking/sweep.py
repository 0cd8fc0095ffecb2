"""The points of one sweep in MLflow: a run for each, made once."""

from __future__ import annotations

from collections.abc import Iterable

from jobs.tracking.store import Run, Store
from jobs.tracking.writer import Refused
from pipeline.axes import Cell
from pipeline.results.lossy import WARNING
from pipeline.results.points import axes, is_measured, point_key, point_metrics, point_name, point_value
from pipeline.store.rows import CellRow


class Sweep:
    """Which points of a sweep are in MLflow. `find` and `log` are for the writer's thread."""

    def __init__(self, sweep_id: str, rows: Iterable[CellRow], stage_run: Run) -> None:
        self.sweep_id = sweep_id
        self.cells: dict[str, list[CellRow]] = {}
        for row in rows:
            self.cells.setdefault(point_key(row.cell), []).append(row)
        tags = {"stage": "cell", "sweep_id": sweep_id}
        self.query = f"tags.sweep_id = '{sweep_id}' AND tags.stage = 'cell'"
        self.runs = {
            key: Run(
                point_name(cells[0].cell), tags | {"cell_key": key} | lossy_tag(cells[0].cell), stage_run
            )
            for key, cells in self.cells.items()
        }
        self.present: dict[str, str] | None = None  # key → run id

    @property
    def measured(self) -> bool:
        return any(map(is_measured, self.cells.values()))

    def find(self, store: Store) -> None:
        """Keep other processes from writing the same points, and look which are there."""
        runs = store.claim(self.sweep_id, self.query)
        self.present = {run.data.tags["cell_key"]: run.info.run_id for run in runs}

    def log(self, store: Store, key: str) -> None:
        """Write a point unless it is there."""
        if self.present is None:
            raise Refused("it is not known which points of the sweep are there")
        if key in self.present:
            return
        cells, run = self.cells[key], self.runs[key]
        store.make(run)
        store.log(run, axes(cells[0].cell), point_metrics(cells), run.began_ms)
        store.end(run, "FINISHED", run.began_ms)
        self.present[key] = run.id

    def best(self, most: int) -> list[str]:
        """Run ids of the fastest exact points or, if none was measured, of those that accept most."""
        present = self.present or {}
        exact = (key for key, cells in self.cells.items() if key in present and not cells[0].cell.lossy)
        ranked = sorted(exact, key=lambda key: -point_value(self.cells[key]))
        return [present[key] for key in ranked[:most]]


def lossy_tag(cell: Cell) -> dict[str, str]:
    """A tag that only points of a lossy rule have: what their text is not."""
    return {"lossy": f"{cell.rule}, {WARNING}"} if cell.lossy else {}
