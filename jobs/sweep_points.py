"""What MLflow is told of a sweep: its points by name, their axes, and metrics that have γ as the step."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.tables import MODES
from pipeline.rows import CellRow

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
