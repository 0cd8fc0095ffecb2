"""Rows, gains and cells for the tests of the study's page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.study import runs
from benchmarks.study.families import BySeed, Families
from pipeline.config.files import load_config
from pipeline.results.summary import FamilyGain, Summary
from pipeline.store.rows import Cell, CellRow, PredictedRow, PromptRow
from tests.helpers.paths import ROOT


def make_row(prompt: str, accepted: int, proposed: int, document: str = "d") -> PromptRow:
    return PromptRow(
        drafter="a", dataset="x", context="1K", policy="chunk_topk", budget=64, control=None, gamma=4,
        temperature=0.0, seed=0, mode="replay", prompt_id=prompt, document_id=document, num_tokens=63,
        num_rounds=20, num_proposed=proposed, num_accepted=accepted, reached=[], kept=[], repetition_rate=0.0,
        looping=False, in_trained_range=True, drafter_kv_bytes=1,
    )  # fmt: skip


def gain(mean: float, low: float, control: str | None = None) -> FamilyGain:
    return FamilyGain(
        drafter="multi_view", baseline="full_only", dataset="x", context="1K", policy="chunk_topk", budget=64,
        control=control, gamma=4, temperature=0.0, seed=0, mean=mean, low=low, high=mean + 0.01,
        num_prompts=9, num_documents=9, prompts="all", num_seeds=3, by_seed=[mean - 0.01, mean, mean + 0.01],
    )  # fmt: skip


def families(rates: dict[tuple[str, float], int]) -> Families:
    """Of two data sets; 4 documents each, one prompt of 1K and one of 4K, of which `rates` accept so many."""
    cells: dict[tuple[str, str, int | str, float, str | None], BySeed] = {}
    for (name, temperature), rate in rates.items():
        for data, budget in itertools.product("xy", (64, "full")):
            rows = {
                f"{document}{context}": make_row(f"{document}{context}", rate, 100, document).model_copy(
                    update={"context": context}
                )
                for document, context in itertools.product("abcd", ("1K", "4K"))
            }
            rows["a4K"] = rows["a4K"].model_copy(update={"num_accepted": 0})
            cells[name, data, budget, temperature, None] = {"42": rows}
    return cells


ABLATIONS = load_config(ROOT / runs.FOLDER / "ablations.yaml")


EMPTY = runs.Study(
    ABLATIONS, Path(), Path(), Summary.model_construct(), cells=[], predicted=[], run_off=[], again=[],
    rows=[], rechecked=[],
)  # fmt: skip


def measured(drafter: str, speedup: float, **changes: object) -> CellRow:
    row = CellRow(
        drafter=drafter, dataset="x", context="4K", policy="streaming", budget=64, control=None, gamma=4,
        temperature=0.0, seed=0, mode="measure", num_prompts=6, num_documents=6, num_looping=2, num_clocked=6,
        acceptance=0.5, acceptance_low=0.4, acceptance_high=0.6, acceptance_not_looping=0.45,
        mean_tokens_per_round=2, conditional_acceptance=[], in_trained_range=True, drafter_kv_bytes=1,
        speedup=speedup, speedup_low=speedup - 0.1, speedup_high=speedup + 0.1,
        end_to_end_speedup=1.0, end_to_end_low=0.9, end_to_end_high=1.1,
    )  # fmt: skip
    return row.model_copy(update=changes)


def axes(cell: CellRow) -> dict[str, Any]:
    return cell.model_dump(include=set(Cell.model_fields))


def predicted(drafter: str, speedup: float) -> PredictedRow:
    return PredictedRow(
        **axes(measured(drafter, 1.0)), num_prompts=9, num_documents=9, decode_s=1.0, speedup=speedup,
        speedup_low=1, speedup_high=2,
    )  # fmt: skip
