"""A whole toy pipeline whose drafters find what is kept elsewhere than it was read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.stages.pipeline import run_pipeline
from pipeline.config.schema import Config
from pipeline.serving.pair import load_pair
from pipeline.store.files import read_all
from pipeline.store.rows import PromptRow
from tests.helpers.toys import artifact, toy_config

VARIANTS: list[dict[str, Any]] = [
    {"name": "full_only", "sparse_weight": 0},
    {"name": "rebased", "positions": "rebased", "budgets": {16: 1}},
    {"name": "anchored", "positions": "anchor_offset", "served_tokens": 400, "budgets": {16: 1}},
]


def placed(values: dict[str, Any]) -> None:
    values["train"]["variants"] = VARIANTS
    values["sweep"] |= {"budgets": [16, "full"], "controls": ["other_prompt"]}
    values["sweep"]["measure"] |= {"drafters": ["rebased"], "budgets": [16]}


def made(config: Config, before: set[str]) -> dict[str, Path]:
    folders = (path for path in Path(config.storage).glob("*-*") if path.name not in before)
    return {path.name.rpartition("-")[0]: path for path in folders}


def test_from_the_target_to_the_report(corpus: Path, storage: Path) -> None:
    before = {path.name for path in storage.glob("*-*")}
    config = toy_config(corpus, storage, placed)
    summary = json.loads(run_pipeline(config).read_text())
    assert summary["lossless"]["exact"] == summary["lossless"]["prompts"] > 0
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] > 0
    folders = made(config, before)
    rows = read_all(folders["sweep"] / "rows", PromptRow)
    found = {(row.cell.drafter, row.cell.budget, row.cell.view.positions) for row in rows}
    assert found == {
        *((name, budget, "true") for name in ("full_only", "anchored") for budget in (16, "full")),
        ("rebased", 16, "rebased"), ("rebased", "full", "true"),
    }  # fmt: skip
    # One is compared with the other wherever its entries stand.
    compared = {gain["cell"]["drafter"] for gain in summary["headline"]}
    assert compared == {"rebased", "anchored"}
    # These texts are no longer than those of training.
    inside = {
        (row.cell.drafter, row.cell.budget): row.in_trained_range for row in rows if not row.cell.control
    }
    assert set(inside.values()) == {True}

    target = artifact(storage, "pretrain-target") / "model"
    models = {name: folders[f"drafter-{name}"] / "model" for name in ("rebased", "anchored")}
    pairs = {name: load_pair(target, model) for name, model in models.items()}
    assert (pairs["rebased"].positions, pairs["anchored"].positions) == ("rebased", "true")
    texts = [pair.continue_prompts(["Once upon"], "chunk_topk", 16, 3, 12) for pair in pairs.values()]
    assert texts[0] == texts[1] != [""]
