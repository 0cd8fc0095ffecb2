"""A pipeline whose training is partly on the target's own answers: from the question to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.executors.choose import NoExecutor
from jobs.plan.facts import known
from jobs.stages import pipeline
from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import ConfigError
from pipeline.config.schema import Config
from pipeline.store.files import read_rows
from pipeline.store.layout import MANIFEST
from pipeline.store.rows import Prompt, PromptRow
from tests.helpers.toys import artifact, toy_config

ASK = "Read this.\n{text}\nSay more."


def asking(values: dict[str, Any]) -> None:
    (tales,) = values["data"]["sources"]
    asked = {**tales, "name": "asked", "ask": ASK, "training_prompts": {48: 6, 60: 4}}
    values["data"]["sources"] = [tales, asked]
    values["labels"] |= {"answers": {"per_prompt": 2, "temperature": 1.0}, "sequences_per_shard": 8}
    for role in ("target", "drafter"):
        values[role]["pretrain"] |= {"steps": 3}
    values["sweep"] |= {"mode": "replay"}


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    return toy_config(corpus, tmp_path / "runs", asking)


def test_from_the_question_to_the_report(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Path(config.storage)
    _, before = known(config)
    report = run_pipeline(config)
    prepared, taught = artifact(storage, "prepare"), artifact(storage, "teach")
    asked = [
        prompt for file in sorted((prepared / "asked").glob("*.jsonl")) for prompt in read_rows(file, Prompt)
    ]
    assert sorted({len(prompt.tokens) for prompt in asked}) == [48, 60] and len(asked) == 10
    tested = [
        prompt
        for file in (prepared / "prompts").glob("test-asked-*.jsonl")
        for prompt in read_rows(file, Prompt)
    ]
    assert tested and not {p.document_id for p in tested} & {p.document_id for p in asked}
    shards = sorted((taught / "labels").glob("answers-*.tokens.npy"))
    counts = json.loads((taught / MANIFEST).read_text())["counts"]
    assert len(shards) == 3 and counts["answers"] == sum(len(np.load(file)) for file in shards) <= 20
    assert counts["sequences"] > 0 and counts["answer_tokens"] > 0
    _, facts = known(config)
    assert facts.answers == 20 and facts.how == "exact" and before.answers >= 20
    rows = [
        row for file in artifact(storage, "sweep").glob("rows/*.jsonl") for row in read_rows(file, PromptRow)
    ]
    assert {row.cell.dataset for row in rows} == {"tales", "asked"}
    assert report.exists()

    monkeypatch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
    run_pipeline(config)  # finds everything


def test_training_may_be_on_answers_alone(corpus: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        asking(values)
        values["data"]["sources"] = values["data"]["sources"][1:]
        values["target"]["pretrain"]["steps"] = 0
        values["drafter"] = {"kind": "first_layers", "layers": [1]}

    config = toy_config(corpus, tmp_path / "runs", change)
    run_pipeline(config, "train")
    labels = artifact(Path(config.storage), "teach") / "labels"
    assert {file.name.split("-")[0] for file in labels.glob("*.npy")} == {"answers"}


def test_a_training_prompt_must_leave_room_for_its_answer(corpus: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        asking(values)
        values["data"]["sources"][1]["training_prompts"] = {90: 4}

    with pytest.raises((ValueError, ConfigError), match=r"sources.1.training_prompts: 90 tokens"):
        toy_config(corpus, tmp_path / "runs", change)
