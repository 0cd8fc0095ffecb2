"""The points of one sweep in MLflow: a run for each, made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from filelock import FileLock

from jobs.tracking.store import OTHERS_S, Run, Store
from jobs.tracking.writer import Refused
from pipeline.results.pool import MODES
from pipeline.store.rows import CellRow

AXES = ("drafter", "dataset", "context", "policy", "budget", "control", "threshold", "temperature", "seed")


def axes(row: CellRow) -> dict[str, object]:
    """What tells a sweep point from the others; γ is not among them, it is the step of the metrics."""
    values = {axis: getattr(row, axis) for axis in AXES}
    return values | {"control": row.control or "none"}


def point_key(row: CellRow) -> str:
    """One line that is the same for all γ of a sweep point, and for nothing else."""
    return "|".join(f"{axis}={value}" for axis, value in axes(row).items())


def point_name(row: CellRow) -> str:
    """Short: what is at its usual value is left out."""
    parts = [row.drafter, row.policy, f"b{row.budget}", row.context, row.dataset]
    if row.control:
        parts.append(row.control)
    if row.threshold:
        parts.append(f"c{row.threshold:g}")
    if row.temperature:
        parts += [f"t{row.temperature:g}", f"s{row.seed}"]
    return "|".join(parts)


def point_metrics(cells: Sequence[CellRow]) -> list[tuple[str, float, int]]:
    """(name, value, γ) of one sweep point. Replayed acceptance goes before measured: it has more prompts."""
    points: dict[tuple[str, int], float] = {}
    for row in sorted(cells, key=lambda row: MODES.index(row.mode)):
        values = {
            "accept/rate": row.acceptance,
            "accept/rate_low": row.acceptance_low,
            "accept/rate_high": row.acceptance_high,
            "accept/rate_not_looping": row.acceptance_not_looping,
            "accept/tau": row.mean_tokens_per_round,
            "accept/prompts": row.num_prompts,
            "speed/speedup": row.speedup,
            "speed/speedup_low": row.speedup_low,
            "speed/speedup_high": row.speedup_high,
            "speed/worst_prompt_speedup": row.worst_prompt_speedup,
            "speed/end_to_end_speedup": row.end_to_end_speedup,
            "speed/tokens_per_s": row.tokens_per_s,
            "speed/ar_tokens_per_s": row.ar_tokens_per_s,
            "mem/drafter_kv_bytes": row.drafter_kv_bytes,
            "mem/target_kv_bytes": row.target_kv_bytes,
            "mem/peak_bytes": row.peak_memory_bytes,
            "quality/looping_share": row.num_looping / row.num_prompts,
            "quality/in_trained_range": row.in_trained_range,
        }
        if row.exact_prompts is not None:
            values["quality/exact_share"] = row.exact_prompts / row.num_prompts
        points |= {(name, row.gamma): float(value) for name, value in values.items() if value is not None}
    widest = max(cells, key=lambda row: row.gamma)
    for position, rate in enumerate(widest.conditional_acceptance, start=1):
        points["position/conditional_acceptance", position] = rate
    measured = [row for row in cells if row.speedup is not None]
    if measured:
        best = max(measured, key=lambda row: row.speedup or 0.0)
        points["speed/best_speedup", 0] = best.speedup or 0.0
        points["speed/best_gamma", 0] = best.gamma
    return [(name, value, step) for (name, step), value in points.items()]


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
