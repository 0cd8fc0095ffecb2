"""Whole toy pipelines whose views are chosen by what the target attends to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.plan.facts import known
from jobs.stages.pipeline import run_pipeline
from jobs.stages.teach import label_bytes
from pipeline.serving.pair import load_pair
from pipeline.store.files import read_all
from pipeline.store.rows import Continuation, PromptRow
from tests.helpers.toys import artifact, toy_config


def guided(values: dict[str, Any]) -> None:
    values["train"]["variants"][1] |= {"policy": "target_guided"}
    values["sweep"] |= {"policies": ["target_guided", "streaming"], "budgets": [16, "full"]}
    values["sweep"] |= {"temperatures": [0.0, 0.8], "controls": ["other_prompt"]}
    values["sweep"]["measure"] |= {"temperatures": [0.0]}


def refreshed(values: dict[str, Any]) -> None:
    guided(values)
    values["sweep"] |= {"temperatures": [0.0], "refresh": 2}


def headed(values: dict[str, Any]) -> None:
    refreshed(values)
    values["target"] = {**values["target"], "layers": 4}
    values["target"]["pretrain"] |= {"steps": 40}
    values["drafter"] = {"kind": "head", "feature_layers": [1, 2, 3]}


CONFIGS = {"lm": guided, "lm, refreshed": refreshed, "head, refreshed": headed}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_from_the_target_to_the_report(corpus: Path, tmp_path: Path, kind: str) -> None:
    config = toy_config(corpus, tmp_path / "runs", CONFIGS[kind])
    storage = Path(config.storage)
    summary = json.loads(run_pipeline(config).read_text())
    assert summary["lossless"]["exact"] == summary["lossless"]["prompts"] > 0
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] > 0
    rows = read_all(artifact(storage, "sweep") / "rows", PromptRow)
    assert {row.cell.policy for row in rows if row.mode == "measure"} == {"target_guided", "streaming"}
    behind = [row for row in rows if row.cell.policy == "target_guided" and row.cell.budget == 16]
    assert any(row.counts.num_accepted for row in behind)
    assert {row.cell.control for row in behind} == {None, "other_prompt"}
    assert {row.cell.view.refresh for row in behind} == {2 if "refreshed" in kind else None}

    teach = artifact(storage, "teach")
    continuations = read_all(teach / "continuations", Continuation)
    assert all(sorted(row.guide) == list(range(row.prompt_tokens // 8)) for row in continuations)
    shapes, facts = known(config)
    written = sum(np.load(file).nbytes for file in (teach / "labels").glob("*.npy"))
    features = 3 * shapes["target"].hidden if "head" in kind else 0
    assert label_bytes(config, facts.labelled, 0, facts.vocab, features) == written

    models = artifact(storage, "pretrain-target") / "model", artifact(storage, "drafter-multi_view") / "model"
    pair, prompt = load_pair(*models), "Once upon a time there was " * 4
    texts = [pair.continue_prompts([prompt], "target_guided", budget, 3, 12) for budget in (16, "full")]
    assert texts[0] == texts[1] != [""]
