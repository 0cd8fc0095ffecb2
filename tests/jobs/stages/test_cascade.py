"""A whole toy pipeline that sweeps a cascade beside self-speculation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.plan.facts import known
from jobs.stages.pipeline import run_pipeline
from pipeline.axes import Place
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.gate.evidence import open_results
from pipeline.store.files import read_all, read_rows
from pipeline.store.rows import CellRow, ModelSize, PredictedRow, PromptRow, StepTimes
from pipeline.sweep.counts import count_sweep
from tests.helpers.toys import PROMPTS, toy_config


def cascaded(values: dict[str, Any]) -> None:
    """The cascade's drafter is not swept itself."""
    cascade = {"drafter": "multi_view", "budget": 16, "gamma": 3}
    values["sweep"] |= {
        "drafters": ["full_only"], "baselines": ["self_speculation", "cascade"], "cascade": cascade,
        "temperatures": [0.0, 0.8], "controls": [],
    }  # fmt: skip
    values["sweep"]["measure"] |= {"drafters": ["full_only"], "predict": True}


@pytest.fixture
def config(corpus: Path, storage: Path) -> Config:
    """On a storage that holds the models and labels."""
    return toy_config(corpus, storage, cascaded)


@pytest.mark.slow
def test_from_the_drafter_to_the_report(config: Config) -> None:
    storage = Path(config.storage)
    before = {path.name for path in storage.glob("*-*")}
    report = run_pipeline(config)
    (swept,) = (path for path in storage.glob("sweep-*") if path.name not in before)
    rows = read_all(swept / "rows", PromptRow)
    assert {row.cell.kind for row in rows if row.cell.drafter == "cascade"} == {"cascade"}
    by_mode = {
        (mode, drafter): {
            (row.cell.vary(drafter="any"), row.prompt_id): row.counts
            for row in rows
            if (row.mode, row.cell.drafter) == (mode, drafter) and row.cell.temperature in (0.0, 0.8)
        }
        for mode in ("replay", "estimate", "measure")
        for drafter in ("self_speculation", "cascade")
    }
    # 2 policies × 2 sparse budgets × 2 γ; the measured ones of one budget and γ, for two prompts.
    assert len(by_mode["replay", "cascade"]) == 2 * 2 * 2 * PROMPTS
    for mode in ("replay", "estimate"):
        assert by_mode[mode, "cascade"] == by_mode[mode, "self_speculation"] != {}
    timed = [row for row in rows if row.mode == "measure" and row.cell.drafter == "cascade"]
    greedy = [row for row in timed if row.cell.temperature == 0]
    assert len(greedy) == 2 * 2 and len(timed) == 2 * len(greedy)
    for row in greedy:
        same = by_mode["replay", "cascade"][row.cell.vary(drafter="any"), row.prompt_id]
        assert row.timing and row.timing.exact and row.counts == same
    sizes = {size.name: size for size in read_rows(swept / "models.jsonl", ModelSize)}
    # An equal shape as full_only's; KV of a token of both caches.
    assert sizes["cascade"].weight_bytes == sizes["full_only"].weight_bytes
    both = sizes["target"].kv_bytes_per_token + sizes["full_only"].kv_bytes_per_token
    assert sizes["cascade"].kv_bytes_per_token == both
    kept = {row.cell.budget: row.drafter_kv_bytes for row in rows if row.cell.drafter == "cascade"}
    of_target, of_drafter = (sizes[name].kv_bytes_per_token for name in ("target", "full_only"))
    assert kept == {budget: budget * of_target + 16 * of_drafter for budget in (16, 32)}

    # Speeds of cascades are measured, and not predicted.
    assert {times.kind for times in read_all(swept / "steps", StepTimes)} == {"drafter", "self_speculation"}
    predicted = read_rows(report.with_name("predicted.jsonl"), PredictedRow)
    assert {row.cell.drafter for row in predicted} == {"full_only", "self_speculation"}
    cells = read_rows(report.with_name("cells.jsonl"), CellRow)
    assert {cell.mode for cell in cells if cell.cell.drafter == "cascade"} == {
        "replay", "estimate", "measure"
    }  # fmt: skip
    # What drafts within it has no rows, and is no candidate for registry, gate or check.
    assert open_results(report.parent).name == "full_only"
    with pytest.raises(BadData, match="no trained drafter 'multi_view'; there are full_only"):
        open_results(report.parent, "multi_view")
    summary = json.loads(report.read_text())
    assert not any("no speed is predicted for cascade" in said for said in summary["findings"])
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] > 0
    assert '<td class="text">cascade</td>' in report.with_name("report.html").read_text()

    planned = count_sweep(config, {Place("tales", "64"): PROMPTS})
    assert planned.replayed == sum(row.mode != "measure" for row in rows)
    assert planned.measured >= sum(row.mode == "measure" for row in rows)
    assert known(config)[0].keys() == {"target", "drafter"}


def test_another_drafter_within_is_another_sweep(corpus: Path, storage: Path) -> None:
    def changed(values: dict[str, Any]) -> None:
        cascaded(values)
        values["sweep"] |= {"mode": "replay", "temperatures": [0.0], "gammas": [2]}
        values["sweep"]["measure"] = {}

    def elsewhere(values: dict[str, Any]) -> None:
        changed(values)
        values["sweep"]["cascade"] = {**values["sweep"]["cascade"], "drafter": "full_only"}

    before = set(storage.glob("sweep-*"))
    for change in (changed, elsewhere):
        run_pipeline(toy_config(corpus, storage, change))
    assert len(set(storage.glob("sweep-*")) - before) == 2
