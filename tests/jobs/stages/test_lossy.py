"""A lossy rule from the config to the report: its rows, its mark on the page, and what is not said of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.recommend import advise
from jobs.stages.pipeline import run_pipeline
from pipeline.results.summary import read_summary
from pipeline.store.files import read_all, read_rows
from pipeline.store.rows import CellRow, PromptRow
from tests.helpers.toys import toy_config


@pytest.fixture(scope="module")
def report(corpus: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sweep that measures alone, on the models of a finished run."""
    storage = Path(shutil.copytree(finished, tmp_path_factory.mktemp("lossy") / "runs"))

    def change(values: dict[str, Any]) -> None:
        values["sweep"] |= {"mode": "measure", "rules": ["exact", "dropmatch"]}
        values["sweep"]["measure"] |= {"gammas": [4], "prompts": 6}
        values["report"]["least_documents"] = 2

    return run_pipeline(toy_config(corpus, storage, change)).parent


def test_its_rows_stand_beside_the_exact_ones(report: Path) -> None:
    cells = read_rows(report / "cells.jsonl", CellRow)
    exact, lossy = ([row for row in cells if row.cell.lossy is wanted] for wanted in (False, True))
    assert [row.cell.vary(rule="exact") for row in lossy] == [row.cell for row in exact] and lossy
    for row in lossy:
        assert row.departure is not None and row.speed is not None and row.exact_prompts is None
        assert row.departure.ar_mean_log_prob < 0 and row.departure.num_compared <= row.departure.num_tokens
    assert all(row.exact_prompts == row.num_prompts and row.departure is None for row in exact)
    rows = [row for folder in report.parent.glob("sweep-*") for row in read_all(folder / "rows", PromptRow)]
    assert {row.mode for row in rows if row.cell.lossy} == {"measure"}


def test_the_page_and_the_summary_mark_it(report: Path) -> None:
    page = (report / "report.html").read_text()
    (section,) = re.findall(r"<h3>Lossy acceptance</h3>.*?</table>", page, re.S)
    assert "dropmatch, lossy: the text is not the target&#39;s own" in section
    rest = page.replace(section, "")
    assert rest.count("dropmatch") == 1 and "measured cells accept by dropmatch" in rest
    summary = read_summary(report / "summary.json")
    named = [*summary.acceptance, *summary.speedup, *summary.headline]
    assert named and not any(one.cell.lossy for one in named)
    assert summary.lossless.exact == summary.lossless.prompts == 6
    assert not any("dropmatch" in str(advice) for advice in summary.recommendations)


def test_the_command_recommends_it_only_if_asked(report: Path) -> None:
    plain = "\n".join(advise(report, 64, None, None, 1, None))
    assert "dropmatch" not in plain and "B = 16, γ = 4" in plain
    asked = "\n".join(advise(report, 64, None, None, 1, None, lossy=True))
    assert "dropmatch (lossy: the text is not the target's own)" in asked
    assert "% of positions hold what autoregressive decoding has there" in asked
