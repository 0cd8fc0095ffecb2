"""The points of one sweep in MLflow: a run for each, made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

from filelock import FileLock

from jobs.tracking.store import OTHERS_S, Run, Store
from jobs.tracking.writer import Refused
from pipeline.axes import Cell
from pipeline.intervals import Interval
from pipeline.results.pool import MODES
from pipeline.store.rows import CellRow

AXES = ("drafter", "dataset", "context", "policy", "budget", "control", "threshold", "temperature", "seed")


def axes(cell: Cell) -> dict[str, object]:
    """What tells a sweep point from the others; γ is not among them, it is the step of the metrics."""
    return {axis: getattr(cell, axis) for axis in AXES} | {"control": cell.control or "none"}


def point_key(cell: Cell) -> str:
    """One line that is the same for all γ of a sweep point, and for nothing else."""
    return "|".join(f"{axis}={value}" for axis, value in axes(cell).items())


def point_name(cell: Cell) -> str:
    """Short: what is at its usual value is left out."""
    parts = [cell.drafter, cell.policy, f"b{cell.budget}", cell.context, cell.dataset]
    if cell.control:
        parts.append(cell.control)
    if cell.threshold:
        parts.append(f"c{cell.threshold:g}")
    if cell.temperature:
        parts += [f"t{cell.temperature:g}", f"s{cell.seed}"]
    return "|".join(parts)


def row_metrics(row: CellRow) -> dict[str, float]:
    """The metrics of one cell in one mode, as far as they were taken."""
    values: dict[str, float | None] = {
        "accept/rate_not_looping": row.acceptance_not_looping,
        "accept/tau": row.mean_tokens_per_round,
        "accept/prompts": row.num_prompts,
        "mem/drafter_kv_bytes": row.drafter_kv_bytes,
        "mem/target_kv_bytes": row.target_kv_bytes,
        "mem/peak_bytes": row.peak_memory_bytes,
        "quality/looping_share": row.num_looping / row.num_prompts,
        "quality/in_trained_range": row.in_trained_range,
    }
    if row.exact_prompts is not None:
        values["quality/exact_share"] = row.exact_prompts / row.num_prompts
    values |= bounds("accept/rate", row.acceptance)
    if row.speed:
        values |= bounds("speed/speedup", row.speed.speedup)
        values |= {
            "speed/worst_prompt_speedup": row.speed.worst_prompt_speedup,
            "speed/end_to_end_speedup": row.speed.end_to_end.mean if row.speed.end_to_end else None,
            "speed/tokens_per_s": row.speed.tokens_per_s,
            "speed/ar_tokens_per_s": row.speed.ar_tokens_per_s,
        }
    return {name: float(value) for name, value in values.items() if value is not None}


def bounds(name: str, interval: Interval | None) -> dict[str, float]:
    """An interval as three metrics."""
    if interval is None:
        return {}
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def point_metrics(cells: Sequence[CellRow]) -> list[tuple[str, float, int]]:
    """(name, value, γ) of one sweep point. Replayed acceptance goes before measured: it has more prompts."""
    points: dict[tuple[str, int], float] = {}
    for row in sorted(cells, key=lambda row: MODES.index(row.mode)):
        points |= {(name, row.cell.gamma): value for name, value in row_metrics(row).items()}
    widest = max(cells, key=lambda row: row.cell.gamma)
    for position, rate in enumerate(widest.conditional_acceptance, start=1):
        points["position/conditional_acceptance", position] = rate
    measured = [(row.speed.speedup.mean, row.cell.gamma) for row in cells if row.speed]
    if measured:
        points["speed/best_speedup", 0], points["speed/best_gamma", 0] = max(measured, key=itemgetter(0))
    return [(name, value, step) for (name, step), value in points.items()]


class Sweep:
    """Which points of a sweep are in MLflow. `find` and `log` are for the writer's thread."""

    def __init__(
        self, store: Store, sweep_id: str, points: Mapping[str, Sequence[CellRow]], lock: FileLock
    ) -> None:
        self.store, self.sweep_id, self.points, self.lock = store, sweep_id, points, lock
        self.tags = {"stage": "cell", "sweep_id": sweep_id}
        self.measured = any(row.speed for cells in points.values() for row in cells)
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
        self.store.log(run, axes(cells[0].cell), point_metrics(cells), run.began_ms)
        self.store.end(run, "FINISHED", run.began_ms)
        self.present[key] = run.id

    def best(self, most: int) -> list[str]:
        """Ids of the runs of the fastest points, or where none was measured of those accepted most."""
        present = self.present or {}
        value = {key: max(map(worth, self.points[key])) for key in self.points if key in present}
        return [present[key] for key in sorted(value, key=lambda key: -value[key])[:most]]


def worth(row: CellRow) -> float:
    """Sorts points, the best last: by speed where it was measured, else by acceptance."""
    if row.speed is not None:
        return row.speed.speedup.mean
    return row.acceptance.mean if row.acceptance else 0.0
