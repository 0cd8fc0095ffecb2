"""Rows, gains and cells for the tests of the study's page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.study import runs
from benchmarks.study.families import BySeed, Families
from pipeline.config.files import load_config
from pipeline.intervals import Interval
from pipeline.results.summary import FamilyGain, Summary
from pipeline.store.rows import CellRow, PredictedRow, PromptRow, Timing
from tests.helpers.paths import ROOT
from tests.helpers.rows import make, varied


def make_row(prompt: str, accepted: int, proposed: int, document: str = "d") -> PromptRow:
    return make(
        PromptRow, drafter="a", dataset="x", context="1K", policy="chunk_topk", budget=64, gamma=4,
        mode="replay", prompt_id=prompt, document_id=document, num_tokens=63, num_rounds=20,
        num_proposed=proposed, num_accepted=accepted, reached=(), kept=(), repetition_rate=0.0, looping=False,
        in_trained_range=True, drafter_kv_bytes=1,
    )  # fmt: skip


def timed_row(prompt: str, decode_s: list[float], peak_memory_bytes: int = 1, **cell: Any) -> PromptRow:
    """A measured prompt, a document of its own."""
    timing = Timing(
        decode_s=decode_s, ar_decode_s=decode_s, ar_num_tokens=63, peak_memory_bytes=peak_memory_bytes
    )
    return varied(make_row(prompt, 1, 2, prompt), mode="measure", timing=timing, **cell)


def gain(mean: float, low: float, control: str | None = None) -> FamilyGain:
    return make(
        FamilyGain, drafter="multi_view", baseline="full_only", dataset="x", context="1K",
        policy="chunk_topk", budget=64, control=control, gamma=4, value=Interval(mean, low, mean + 0.01),
        num_prompts=9, num_documents=9, prompts="all", num_seeds=3, by_seed=[mean - 0.01, mean, mean + 0.01],
    )  # fmt: skip


def families(rates: dict[tuple[str, float], int]) -> Families:
    """Of two data sets; 4 documents each, one prompt of 1K and one of 4K, of which `rates` accept so many."""
    cells: dict[tuple[str, str, int | str, float, str | None], BySeed] = {}
    for (name, temperature), rate in rates.items():
        for data, budget in itertools.product("xy", (64, "full")):
            rows = {
                f"{document}{context}": varied(
                    make_row(f"{document}{context}", rate, 100, document), context=context
                )
                for document, context in itertools.product("abcd", ("1K", "4K"))
            }
            rows["a4K"] = varied(rows["a4K"], num_accepted=0)
            cells[name, data, budget, temperature, None] = {"42": rows}
    return cells


ABLATIONS = load_config(ROOT / runs.FOLDER / "ablations.yaml")


EMPTY = runs.Study(
    ABLATIONS, Path(), Path(), Summary.model_construct(), cells=[], predicted=[], run_off=[], again=[],
    rows=[], rechecked=[],
)  # fmt: skip


def measured(drafter: str, speedup: float, **changes: Any) -> CellRow:
    row = make(
        CellRow, drafter=drafter, dataset="x", context="4K", policy="streaming", budget=64, gamma=4,
        mode="measure", num_prompts=6, num_documents=6, num_looping=2, acceptance=Interval(0.5, 0.4, 0.6),
        acceptance_not_looping=0.45, mean_tokens_per_round=2, conditional_acceptance=[],
        in_trained_range=True, drafter_kv_bytes=1, speedup=around(speedup), worst_prompt_speedup=speedup,
        end_to_end=around(1.0), tokens_per_s=speedup, ar_tokens_per_s=1.0, num_clocked=6,
    )  # fmt: skip
    return varied(row, **changes)


def replayed(drafter: str, **changes: Any) -> CellRow:
    return varied(measured(drafter, 1.0), mode="replay", speed=None, **changes)


def around(mean: float) -> Interval:
    return Interval(mean, mean - 0.1, mean + 0.1)


def predicted(drafter: str, speedup: float, **changes: Any) -> PredictedRow:
    row = PredictedRow(
        cell=measured(drafter, 1.0).cell, num_prompts=9, num_documents=9, decode_s=1.0,
        speedup=Interval(speedup, 1, 2),
    )  # fmt: skip
    return varied(row, **changes)
