"""Rows of earlier formats, read as today's: results, reports and registered evidence stay readable.

Before format 3 the fields of a cell, its counts, its timing and its intervals lay side by side in each row:
an interval called `speedup` was `speedup`, `speedup_low` and `speedup_high`. What a row of today nests is
made of them; what it holds besides is left alone.
"""

from __future__ import annotations

from typing import Any

VIEW = ("policy", "budget", "control")
CELL = ("drafter", "dataset", "context", "gamma", "threshold", "temperature", "seed")
COUNTS = ("num_tokens", "num_rounds", "num_proposed", "num_accepted", "reached", "kept")
TIMING = (
    "decode_s", "ar_decode_s", "ar_num_tokens", "prefill_s", "ar_prefill_s", "compile_s", "prompts_together",
    "together_with", "target_kv_bytes", "peak_memory_bytes", "exact", "divergence_gap", "logit_noise",
    "hardware", "text",
)  # fmt: skip
SPEED = ("worst_prompt_speedup", "tokens_per_s", "ar_tokens_per_s", "num_clocked")
INTERVALS = ("acceptance", "speedup", "end_to_end", "again")
BASELINES = ("self_speculation", "prompt_lookup")  # each is a kind of drafter of its own


def as_today(data: Any) -> Any:
    """`data` as a row of today; what is one already, or no row of any format, as it is."""
    if not isinstance(data, dict) or "cell" in data or not {"drafter", "policy", "gamma"} <= data.keys():
        return data
    row = dict(data)
    view = {name: row.pop(name) for name in VIEW if name in row}
    row["cell"] = {name: row.pop(name) for name in CELL if name in row} | {"view": view}
    if row["cell"]["drafter"] in BASELINES:
        row["cell"]["kind"] = row["cell"]["drafter"]
    if "end_to_end_speedup" in row:
        row["end_to_end"] = row.pop("end_to_end_speedup")
    for name in INTERVALS:
        if f"{name}_low" in row:
            row[name] = interval(row.pop(name), row.pop(f"{name}_low"), row.pop(f"{name}_high"))
    if {"mean", "low", "high"} <= row.keys():
        row["value"] = interval(row.pop("mean"), row.pop("low"), row.pop("high"))
    if isinstance(row.get("lost"), list):
        row["lost"] = interval(*row["lost"])
    if "num_rounds" in row:
        row["counts"] = {name: row.pop(name) for name in COUNTS if name in row}
        timing = {name: row.pop(name) for name in TIMING if name in row}
        row["timing"] = known(timing) if timing.get("decode_s") else None
    if "worst_prompt_speedup" in row:
        names = ("speedup", "end_to_end", *SPEED)
        speed = {name: row.pop(name) for name in names if name in row}
        row["speed"] = speed if speed["speedup"] else None
    return row


def interval(mean: float | None, low: float | None, high: float | None) -> dict[str, float] | None:
    """None where it was not taken; then the bounds are None too."""
    if mean is None or low is None or high is None:
        return None
    return {"mean": mean, "low": low, "high": high}


def known(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
