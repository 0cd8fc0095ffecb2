"""Rows and files for MLflow's mirror to follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.intervals import Interval
from pipeline.store.rows import CellRow
from tests.helpers.rows import make


def write_rows(path: Path, rows: list[dict[str, float]], torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def cell(**changes: Any) -> CellRow:
    values: dict[str, Any] = {
        "drafter": "multi_view",
        "dataset": "pg19",
        "context": "4K",
        "policy": "chunk_topk",
        "budget": 256,
        "gamma": 4,
        "mode": "replay",
        "num_prompts": 80,
        "num_documents": 20,
        "num_looping": 8,
        "acceptance": Interval(0.5, 0.4, 0.6),
        "acceptance_not_looping": None,
        "mean_tokens_per_round": 2.5,
        "conditional_acceptance": [0.6, 0.5, 0.4, 0.3],
        "in_trained_range": True,
        "drafter_kv_bytes": 1000,
        "target_kv_bytes": 9000,
    }
    return make(CellRow, **(values | changes))


def timed(speedup: float, **changes: Any) -> CellRow:
    """The same cell, measured on fewer prompts."""
    speed = {
        "speedup": Interval(speedup, speedup - 0.1, speedup + 0.1), "worst_prompt_speedup": 1.0,
        "end_to_end": None, "tokens_per_s": 30.0, "ar_tokens_per_s": 20.0, "num_clocked": 4,
    }  # fmt: skip
    measured = {
        "mode": "measure",
        "num_prompts": 4,
        "acceptance": Interval(0.9, 0.8, 1.0),
        "exact_prompts": 3,
    }
    return cell(**(speed | measured | changes))


def planted(*folders: Path) -> list[Path]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    return [file for file in files if b"pa55word" in file.read_bytes()]
