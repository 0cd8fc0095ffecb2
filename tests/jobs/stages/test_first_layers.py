"""A whole toy pipeline whose drafters are layers of its target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.executors.choose import NoExecutor
from jobs.plan.facts import known
from jobs.stages import pipeline
from jobs.stages.pipeline import run_pipeline
from pipeline.config.schema import Config
from pipeline.store.files import read_all
from pipeline.store.rows import Continuation, PromptRow
from tests.helpers.toys import artifact, toy_config


def layered(values: dict[str, Any]) -> None:
    values["drafter"] = {"kind": "first_layers", "layers": [1]}


@pytest.fixture
def config(corpus: Path, storage: Path) -> Config:
    """On a storage that holds the target and its labels."""
    return toy_config(corpus, storage, layered)


def test_from_the_target_to_the_report(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Path(config.storage)
    before = {path.name for path in storage.glob("*-*")}
    report = run_pipeline(config)
    made = {path.name.rpartition("-")[0] for path in storage.glob("*-*") if path.name not in before}
    assert made >= {"drafter-full_only", "drafter-multi_view", "sweep", "report"}
    assert not made & {"pretrain-drafter", "pretrain-target", "teach"}  # the target's, as they were
    summary = json.loads(report.read_text())
    assert summary["lossless"]["exact"] == summary["lossless"]["prompts"] == 2
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] == 2
    page = report.with_name("report.html").read_text()
    assert "the target&#39;s layers 1 between its own embedding and head, float32" in page
    (sweep,) = (path for path in storage.glob("sweep-*") if path.name not in before)
    rows = read_all(sweep / "rows", PromptRow)
    assert rows and {row.cell.kind for row in rows} == {"first_layers"}
    target = load_file(artifact(storage, "pretrain-target") / "model" / "model.safetensors")
    (drafter,) = (path for path in storage.glob("drafter-multi_view-*") if path.name not in before)
    weights = load_file(drafter / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(weights[name], target[name])
    assert json.loads((drafter / "model" / "config.json").read_text())["num_hidden_layers"] == 1

    monkeypatch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
    run_pipeline(config)  # finds everything
    assert len({*storage.glob("drafter-multi_view-*")}) == 2


def test_the_plan_counts_what_is_trained_and_what_is_shared(config: Config) -> None:
    shapes, _ = known(config)
    run_pipeline(config, "train")
    found = Path(config.storage).glob("drafter-multi_view-*/model/*.safetensors")
    weights = load_file(max(found, key=lambda path: path.stat().st_mtime_ns))
    trained = sum(value.numel() for name, value in weights.items() if ".layers." in name)
    drafter, target = shapes["drafter"], shapes["target"]
    assert (drafter.trained, drafter.layers) == (trained, 1)
    assert drafter.frozen + trained == sum(value.numel() for value in weights.values())
    assert target.frozen == 0 and target.hidden == drafter.hidden


def test_drafters_that_propose_few_tokens(corpus: Path, storage: Path) -> None:
    """Texts are the target's whatever cannot be proposed; replay is decoding; the folder names the tokens."""

    def change(values: dict[str, Any]) -> None:
        layered(values)
        values["train"]["draft_vocabulary"] = 16
        values["sweep"] |= {"temperatures": [0.0, 0.8], "seeds": [0]}
        values["sweep"]["measure"]["temperatures"] = [0.0, 0.8]

    before = {path.name for path in storage.glob("*-*")}
    summary = json.loads(run_pipeline(toy_config(corpus, storage, change)).read_text())
    assert summary["lossless"]["exact"] == summary["lossless"]["prompts"] > 0
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] > 0
    (drafter,) = (path for path in storage.glob("drafter-multi_view-*") if path.name not in before)
    told = json.loads((drafter / "model" / "draft_vocabulary.json").read_text())
    inside = {*told["tokens"]}
    assert len(inside) == 16
    labels = np.concatenate(
        [np.load(file).reshape(-1) for file in storage.glob("teach-*/labels/*.argmax.npy")]
    )
    ranked = sorted(range(told["of"]), key=lambda token: (-np.count_nonzero(labels == token), token))
    assert len({*ranked[:16]} ^ inside) <= 2  # for what ends texts
    (sampled,) = storage.glob("sample-*")
    texts = [
        row
        for folder in (artifact(storage, "teach"), sampled)
        for row in read_all(folder / "continuations", Continuation)
        if row.split == "test"
    ]
    assert {text.temperature for text in texts} == {0.0, 0.8}
    for covered in summary["coverage"]:  # greedy and sampled texts apart
        tokens = [t for text in texts if text.temperature == covered["temperature"] for t in text.tokens[1:]]
        assert covered["tokens"] == len(tokens)
        assert covered["share"] == sum(token in inside for token in tokens) / len(tokens) < 1
    assert [covered["temperature"] for covered in summary["coverage"]] == [0.0, 0.8]
    rows = [json.loads(line) for line in (drafter / "metrics.jsonl").read_text().splitlines()]
    shares = [row["train/outside"] for row in rows if "train/outside" in row]
    assert shares and all(0 < share < 0.9 for share in shares)
