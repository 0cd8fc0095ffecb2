"""Results for an experiment tracker: the points of a sweep as curves over γ, and the recommendations."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from pipeline.axes import Cell
from pipeline.intervals import Interval
from pipeline.results.pool import MODES
from pipeline.results.recommend import Recommendation, settings_text
from pipeline.store.rows import CellRow

Point = tuple[str, float, int]  # name, value, step
AXES = ("drafter", "dataset", "context", "policy", "budget", "control", "threshold", "temperature", "seed")


def axes(cell: Cell) -> dict[str, object]:
    """The settings that identify a sweep point. γ is not one of them: it is the step of the metrics.

    Settings other than `AXES` are left out where they have their usual value.
    """
    usual: dict[str, object] = {axis: getattr(cell, axis) for axis in AXES}
    usual["control"] = cell.control or "none"
    view = cell.view
    rare = {"sinks": view.sinks, "refresh": view.refresh, "positions": view.positions, "rule": cell.rule}
    return usual | {axis: value for axis, value in rare.items() if value not in (None, "true", "exact")}


def point_key(cell: Cell) -> str:
    """One line that is the same for all γ of a sweep point, and for nothing else."""
    return "|".join(f"{axis}={value}" for axis, value in axes(cell).items())


def point_name(cell: Cell) -> str:
    """A short name: settings at their usual value are left out."""
    parts = [cell.drafter, cell.policy, f"b{cell.budget}", cell.context, cell.dataset]
    if cell.control:
        parts.append(cell.control)
    if cell.threshold:
        parts.append(f"c{cell.threshold:g}")
    if cell.temperature:
        parts += [f"t{cell.temperature:g}", f"s{cell.seed}"]
    if cell.lossy:
        parts.append(cell.rule)
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
    if row.departure:
        values |= {
            "quality/same_as_ar_share": row.departure.same,
            "quality/not_best_share": row.departure.not_best,
            "quality/log_prob": row.departure.mean_log_prob,
            "quality/ar_log_prob": row.departure.ar_mean_log_prob,
        }
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


def point_metrics(cells: Sequence[CellRow]) -> list[Point]:
    """(name, value, γ) of one sweep point. Replayed acceptance replaces measured: it has more prompts."""
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


def is_measured(cells: Sequence[CellRow]) -> bool:
    return any(row.speed for row in cells)


def point_value(cells: Sequence[CellRow]) -> float:
    """What points are ranked by: the best speedup, or where none was measured the best acceptance."""
    speeds = [row.speed.speedup.mean for row in cells if row.speed]
    return max(speeds or [row.acceptance.mean for row in cells if row.acceptance], default=0.0)


def advice_of(advice: Recommendation) -> tuple[str, dict[str, str], list[Point]]:
    """The place, what to deploy there in words, and where there is a choice its expected speedup."""
    place = f"{advice.dataset}.{advice.context}"
    if advice.choice is None:
        return place, {f"recommend.{place}": advice.why}, []
    tags = {f"recommend.{place}": f"{settings_text(advice.choice.cell)}: {advice.why}"}
    speed = bounds("recommend/speedup", advice.choice.expected)
    return place, tags, [(f"{name}.{place}", value, 0) for name, value in speed.items()]
