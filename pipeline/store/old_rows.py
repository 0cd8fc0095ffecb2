"""Rows of earlier formats, read as today's: results, reports and registered evidence stay readable.

They had the fields of a cell, its counts, its timing and its intervals side by side: an interval called
`speedup` was `speedup`, `speedup_low` and `speedup_high`. The nested fields of today's rows are made of them;
all else is left as it is, so that the row's own validation reports what is missing or wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
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
BOUNDED = ("acceptance", "speedup", "end_to_end", "again")  # with their bounds beside them
TRIPLES = ("lost", "not_looping", "other_prompt")  # in one list with their bounds
PARTS = ("mean", "low", "high")
BASELINES = ("self_speculation", "prompt_lookup")  # of these formats; each is a kind of its own


def as_today(data: Any) -> Any:
    """`data` as a row of today; unchanged if it is one already, or no row of any format."""
    if not isinstance(data, dict) or "cell" in data or not data.keys() & {"drafter", "policy", "gamma"}:
        return data
    row = dict(data)
    row["cell"] = take(row, CELL) | {"view": take(row, VIEW)}
    if row["cell"].get("drafter") in BASELINES:
        row["cell"]["kind"] = row["cell"]["drafter"]
    if "end_to_end_speedup" in row:
        row["end_to_end"] = row.pop("end_to_end_speedup")
    for name in BOUNDED:
        bounds = {"low": f"{name}_low", "high": f"{name}_high"}
        if row.keys() & bounds.values():
            parts = {"mean": name} | bounds
            row[name] = known({part: row.pop(field) for part, field in parts.items() if field in row})
    for name in TRIPLES:
        if isinstance(row.get(name), list) and len(row[name]) == len(PARTS):
            row[name] = dict(zip(PARTS, row[name], strict=True))
    if "mean" in row:
        row["value"] = take(row, PARTS)
    if row.keys() & COUNTS:
        row["counts"] = take(row, COUNTS)
        timing = {name: value for name, value in take(row, TIMING).items() if value is not None}
        row["timing"] = timing if timing.get("decode_s") else None
    if row.keys() & SPEED:
        row["speed"] = known(take(row, ("speedup", "end_to_end", *SPEED)))
    return row


def take(row: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Move the named values out of a row, as far as it has them."""
    return {name: row.pop(name) for name in names if name in row}


def known(values: dict[str, Any]) -> dict[str, Any] | None:
    """None where no value is known; values that are known in part are kept, for the row to refuse."""
    return values if any(value is not None for value in values.values()) else None
