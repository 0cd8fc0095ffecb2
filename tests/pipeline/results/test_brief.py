"""The three answers on the report's first screen, from rows made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.stages.report import ReportInputs, report
from pipeline.results.brief import answers
from pipeline.results.summary import Summary
from pipeline.store.files import read_rows
from pipeline.store.rows import CellRow, PromptRow
from tests.helpers.configs import MINIMAL
from tests.helpers.report import artifacts, config, measured, row


def told(storage: Path, rows: list[PromptRow], **groups: Any) -> tuple[str, str, str]:
    made = report(config(storage, **groups), ReportInputs(*artifacts(storage, rows, []), stages=[])).path
    summary = Summary.model_validate_json((made / "summary.json").read_text())
    one, two, three = (answer.text for answer in answers(summary, read_rows(made / "cells.jsonl", CellRow)))
    page = (made / "report.html").read_text()
    assert page.index("Is it worth it here?") < page.index("<table")
    return one, two, three


def test_where_it_pays_and_where_it_does_not(tmp_path: Path) -> None:
    """Two places: 3 s of AR against 2 s, and against 4 s; one text of twelve loops in the first."""
    rows = [measured(prompt=n) for n in range(12)]
    rows += [measured(prompt=n, dataset="tales", budget="full", decode_s=[4.0, 4.0]) for n in range(12)]
    rows += [row(prompt=n, looping=n == 3) for n in range(12)]
    sources = [{"kind": "text", "name": name, "files": ["stdlib"]} for name in ("code", "tales")]
    worth, what, why = told(tmp_path, rows, data={**MINIMAL["data"], "sources": sources})
    assert worth == (
        "Yes for code at 64 (1.50× [1.50, 1.50]): so many times as fast as autoregressive decoding. "
        "Not for tales at 64 (the best is 0.75× [0.75, 0.75])."
    )
    assert (
        what == "The drafter full_only behind 16 prefix entries (chunk_topk), 4 tokens a round: code at 64."
    )
    assert why.startswith("24 of 24 measured texts are the target's own, token for token. Replay counted as")
    assert "over at least 6 documents a place, measured once" in why
    assert "Of 24 greedy texts 1 loop" in why


@pytest.mark.parametrize("prompts", [2, 4])
def test_few_documents_are_no_verdict(tmp_path: Path, prompts: int) -> None:
    worth, what, _ = told(tmp_path, [measured(prompt=n) for n in range(prompts)])
    assert (worth, what) == ("Not known for code at 64 (too few documents to rank).", "That is not known.")


def test_where_nothing_pays(tmp_path: Path) -> None:
    worth, what, _ = told(tmp_path, [measured(prompt=n, decode_s=[4.0, 4.0]) for n in range(12)])
    assert worth == "No, not for code at 64 (the best is 0.75× [0.75, 0.75])."
    assert what == "With none of what was timed."


def test_without_a_clock_nothing_is_worth_anything(tmp_path: Path) -> None:
    worth, what, why = told(tmp_path, [row(prompt=n) for n in range(12)])
    assert worth.startswith("Nothing was timed") and what == "That is not known."
    assert why.endswith("Of 12 greedy texts 0 loop.")


def test_prompt_lookup_is_named_in_words(tmp_path: Path) -> None:
    rows = [measured("prompt_lookup", prompt=n, policy="none", budget=0) for n in range(12)]
    _, what, _ = told(tmp_path, rows, sweep={**MINIMAL["sweep"], "baselines": ["prompt_lookup"]})
    assert what == "Prompt lookup, 4 tokens a round: code at 64."
