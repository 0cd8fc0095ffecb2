"""The whole sweep on toy models: replay, calibration, prediction, measuring, and measuring again."""

from __future__ import annotations

import copy
import re
import shutil
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from jobs.commands.recommend import advise
from jobs.stages.pipeline import run_pipeline
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.results.summary import Summary
from pipeline.store.files import read_all, read_rows
from pipeline.store.rows import CellRow, PredictedRow, PromptRow, StepTimes
from pipeline.sweep import predict
from pipeline.sweep.evaluator import Evaluator, MeasureTask
from tests.helpers.configs import MINIMAL
from tests.helpers.documents import story

pytestmark = pytest.mark.slow

PROMPTS, MEASURED, REPEATS = 12, 6, 2
BASELINES = ("self_speculation", "prompt_lookup")


def predicting(corpus: Path, storage: Path) -> Config:
    """Two training seeds, baselines, two contexts, one with a smaller largest γ and a
    name that the other begins with, two temperatures."""
    values: dict[str, Any] = copy.deepcopy(MINIMAL)
    source = {"kind": "text", "name": "tales", "files": ["*.txt"], "validation_fraction": 0.1}
    values["storage"] = str(storage)
    values["data"] |= {
        "root": str(corpus), "sources": [{**source, "test_fraction": 0.3}], "prompts": PROMPTS,
        "prompts_per_document": 2, "max_sequences": 40,
        "contexts": [{"name": "4", "tokens": 48}, {"name": "48", "tokens": 64}],
    }  # fmt: skip
    values["train"]["variants"] = [
        {"name": "full_only", "sparse_weight": 0, "seeds": [1, 2]},
        {"name": "multi_view", "budgets": {16: 0.6, 32: 0.4}, "seeds": [1, 2]},
    ]
    for role in ("target", "drafter"):
        values[role]["pretrain"] = {"steps": 60, "batch_sequences": 4, "learning_rate": 0.02}
    values["sweep"] |= {
        "mode": "both", "baselines": list(BASELINES), "max_gammas": {"4": 2}, "temperatures": [0.0, 1.0],
        "measure": {
            "drafters": ["multi_view~1"], "budgets": [16], "gammas": [2], "temperatures": [0.0],
            "prompts": MEASURED, "repeats": REPEATS,
            "plane": {"drafter": "full_only", "dataset": "tales", "context": "48"},
        },
    }  # fmt: skip
    values["report"] = {"bootstrap_samples": 100}
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    corpus = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (corpus / f"tale{number:02d}.txt").write_text(story(number))
    return predicting(corpus, tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def report(config: Config) -> Path:
    return run_pipeline(config).parent


@pytest.fixture(scope="module")
def swept(report: Path) -> Path:
    (folder,) = report.parent.glob("sweep-*")
    return folder


def summary_of(report: Path) -> Summary:
    return Summary.model_validate_json((report / "summary.json").read_text())


def test_every_source_is_replayed_and_estimated(swept: Path) -> None:
    rows = [row for row in read_all(swept / "rows", PromptRow) if row.mode != "measure"]
    assert {row.mode for row in rows if row.cell.temperature == 0} == {"replay"}
    assert {row.mode for row in rows if row.cell.temperature == 1} == {"estimate"}
    trained = {f"{variant}~{seed}" for variant in ("full_only", "multi_view") for seed in (1, 2)}
    assert {row.cell.drafter for row in rows} == trained | {*BASELINES}
    assert {row.cell.gamma for row in rows if row.cell.context == "4"} == {2}
    assert {row.cell.gamma for row in rows if row.cell.context == "48"} == {2, 4}
    views = {
        drafter: {(row.cell.policy, row.cell.budget) for row in rows if row.cell.drafter == drafter}
        for drafter in BASELINES
    }
    assert views["prompt_lookup"] == {("none", 0)}
    assert views["self_speculation"] == {(p, b) for p in ("streaming", "snapkv") for b in (16, 32)}


def test_estimates_are_of_the_size_of_what_sampling_gives(swept: Path) -> None:
    """Expected counts over one sampled text a prompt lie within what counts can be."""
    for row in read_all(swept / "rows", PromptRow):
        if row.mode == "estimate":
            counts, gamma = row.counts, row.cell.gamma
            assert counts.num_proposed is not None and 0 <= counts.num_accepted <= counts.num_proposed
            assert counts.num_tokens / (gamma + 1) <= counts.num_rounds + 1e-9 <= counts.num_tokens + 1e-6


def test_all_that_is_measured_is_exact_and_replay_knew_it(swept: Path) -> None:
    rows = read_all(swept / "rows", PromptRow)
    replayed = {(row.cell, row.prompt_id): row for row in rows if row.mode == "replay"}
    measured = [row for row in rows if row.mode == "measure"]
    assert {row.cell.drafter for row in measured} >= {"multi_view~1", *BASELINES}
    for row in measured:
        same = replayed[row.cell, row.prompt_id]
        assert row.timing.exact and row.num_left_out == 0 and len(row.timing.decode_s) == REPEATS
        assert row.counts == same.counts
    # The plane: every budget and γ of the first seed of full_only, at the longer context.
    plane = {
        (row.cell.budget, row.cell.gamma)
        for row in measured
        if (row.cell.drafter, row.cell.context) == ("full_only~1", "48")
    }
    assert plane == {(budget, gamma) for budget in (16, 32, "full") for gamma in (2, 4)}


def test_every_replayed_greedy_cell_is_predicted_and_kept_apart(report: Path, swept: Path) -> None:
    predicted = read_rows(report / "predicted.jsonl", PredictedRow)
    rows = read_all(swept / "rows", PromptRow)
    wanted = {row.cell for row in rows if row.mode == "replay" and row.cell.control is None}
    assert {row.cell for row in predicted} == wanted
    times = read_all(swept / "steps", StepTimes)
    assert {time.context for time in times} == {"4", "48"}
    assert {time.kind for time in times} == {"drafter", *BASELINES}
    assert all(min(t.draft_s, t.ar_s, *t.verify_s.values()) > 0 for t in times)
    scored = {(s.context, s.what): s.cells for s in summary_of(report).prediction}
    assert scored["48", "plane"] == scored["48", "plane by earlier steps"] == 3 * 2
    assert scored["48", "other cells"] > 0 and ("4", "plane") not in scored


def test_steps_are_timed_again_around_the_prompts_of_the_plane(swept: Path, report: Path) -> None:
    """Those of a trained drafter at its context, before and behind each of its files of rows."""
    beside = {file.name: read_rows(file, StepTimes) for file in (swept / "steps_beside").iterdir()}
    assert beside.keys() == {file.name for file in (swept / "rows").glob("measure-*-tales-48-*.jsonl")}
    assert len(beside) == MEASURED
    around = [("48", "drafter", budget) for budget in (16, 32, "full")] * 2
    assert all([(t.context, t.kind, t.budget) for t in times] == around for times in beside.values())
    (by_beside,) = [s for s in summary_of(report).prediction if s.what == "plane"]
    means = predict.mean_step_times(read_all(swept / "steps_beside", StepTimes))
    found = predict.errors(read_all(swept / "rows", PromptRow), means)
    plane = [e for cell, e in found.items() if cell.drafter == "full_only~1" and cell.context == "48"]
    assert by_beside.median_error_s == median(abs(error.seconds) for error in plane)


def test_the_fastest_cells_are_measured_again(report: Path, swept: Path) -> None:
    """Three of each context, on the same prompts, twice and more often; the summary tells the last apart."""
    rows = read_all(swept / "rechecked", PromptRow)
    again = {row.cell for row in rows}
    assert Counter(cell.context for cell in again) == {"4": 3, "48": 3}
    played = read_all(swept / "run_off", PromptRow)
    assert Counter(row.cell for row in played) == Counter(row.cell for row in rows)
    assert [row.timing.decode_s for row in played] != [row.timing.decode_s for row in rows]
    (repeats,) = {
        len(row.timing.decode_s) for row in read_all(swept / "rows", PromptRow) if row.mode == "measure"
    }
    for row in (*played, *rows):
        assert len(row.timing.decode_s) == len(row.timing.ar_decode_s) == 4 * repeats
    cells = [c for c in read_rows(report / "cells.jsonl", CellRow) if c.mode == "measure"]
    for context in ("4", "48"):
        here = [c for c in cells if c.cell.context == context]
        fastest = sorted(here, key=lambda c: -c.speed.speedup.mean)[:3]
        assert {row.cell for row in fastest} == {cell for cell in again if cell.context == context}
    advised = summary_of(report).recommendations
    assert [advice.context for advice in advised] == ["4", "48"]
    for advice in advised:
        chosen = advice.choice or advice.runner_up
        assert advice.num_again == 3 and advice.best_again is not None
        assert chosen is not None and (chosen.again is not None) == (chosen.cell in again)
        assert (chosen.run_off is None) == (chosen.again is None)
        assert advice.choice is None or advice.choice.expected.low > 1
    page = (report / "report.html").read_text()
    assert "What to deploy" in page and page.count('<td class="text">plane by earlier steps</td>') == 1


# ── budgetdraft recommend ─────────────────────────────────────────────────────────────────────────


def test_recommend_reads_a_report(report: Path) -> None:
    text = "\n".join(advise(report / "summary.json", 60, None, 1.0, 4, None))
    assert not any("stands for" in line for line in advise(report, 64, None, None, 1, None))
    assert text.startswith("48 (64 tokens) stands for a context of 60 tokens.\ntales, 48:")
    assert "It is that of 4 texts at once" in text
    assert "fresh repeats" in text and "end to end" in text
    small = "\n".join(advise(report, 40, "tales", 1e-6, 1, None))
    assert "do not speculate here: every measured cell is out for memory" in small
    # Random texts: no source has every proposal accepted.
    never = "\n".join(advise(report, 40, None, None, 1, 1.0))
    assert re.search(
        r"every measured cell is out for acceptance; those out for acceptance have [\d.]+ % at most "
        r"\(.+, B = .+, γ = \d\), the least is 100 %",
        never,
    )


@pytest.mark.parametrize(
    ("context", "dataset", "part"),
    [
        (500, None, "--context 500 is beyond the contexts of these results: 4 = 48 tokens, 48 = 64 tokens"),
        (64, "poems", "no measured speed at 48 for data set 'poems'; there is tales"),
    ],
)
def test_recommend_says_what_is_missing(report: Path, context: int, dataset: str | None, part: str) -> None:
    with pytest.raises(BadData, match=re.escape(part)):
        list(advise(report, context, dataset, None, 1, None))
    with pytest.raises(BadData, match=r"holds no summary\.json"):
        list(advise(report.parent, 64, None, None, 1, None))


# ── resuming ──────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_that_broke_off_goes_on_with_what_it_had_picked(
    config: Config, report: Path, swept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions, picks and timed files stay; only what is missing is measured, with the steps around it.

    Last, as it changes them.
    """
    kept = {file: file.read_bytes() for file in swept.rglob("*.jsonl")}
    lost = sorted((swept / "rows").glob("measure-*-tales-48-*"))[2:3]
    around = swept / "steps_beside" / lost[0].name
    of_other_picks = swept / "steps_beside" / "measure-000000-tales-48-00000.jsonl"
    of_other_picks.write_bytes(around.read_bytes())
    for file in [*lost, swept / "manifest.json"]:
        file.unlink()
    shutil.rmtree(report)
    tasks: list[Path] = []
    whole = Evaluator.measure

    def watched(self: Evaluator, task: MeasureTask) -> object:
        tasks.append(task.output)
        return whole(self, task)

    monkeypatch.setattr(Evaluator, "measure", watched)
    run_pipeline(config)
    assert [task for task in tasks if task.parent.name == "rows"] == lost
    # With other times the fastest cells may be others, so that what was measured again is not compared.
    kept = {
        file: content for file, content in kept.items() if file.parent.name not in ("run_off", "rechecked")
    }
    assert {f for f, content in kept.items() if f.read_bytes() != content} == {*lost, around}
    assert not of_other_picks.exists()
