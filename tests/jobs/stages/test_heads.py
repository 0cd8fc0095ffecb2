"""A whole toy pipeline whose drafters are heads over their target's hidden states."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs.executors.choose import NoExecutor
from jobs.plan.facts import known
from jobs.stages import pipeline
from jobs.stages.pipeline import completed, run_pipeline
from jobs.stages.teach import label_bytes
from pipeline.config.schema import Config
from pipeline.data.tokenizer import encode_prompt
from pipeline.plan.flops import work
from pipeline.serving import load_pair
from pipeline.store.files import read_all
from pipeline.store.rows import PromptRow
from tests.helpers.tiny import assert_same_run, losses
from tests.helpers.toys import artifact, toy_config

FEATURES = [1, 2, 3]


def headed(values: dict[str, Any]) -> None:
    values["target"] = {**values["target"], "layers": 4}
    values["target"]["pretrain"] |= {"steps": 40}
    values["drafter"] = {"kind": "head", "feature_layers": FEATURES, "fc_norm": True}
    values["train"] |= {"draft_vocabulary": 200, "chain_steps": 2, "validation_budgets": [16, "full"]}
    values["labels"] |= {"top_k": 8}
    values["train"]["variants"][1] |= {"full_loss": "lk_hybrid", "sparse_loss": "nla"}
    values["sweep"] |= {"temperatures": [0.0, 0.8], "baselines": ["self_speculation"]}
    values["sweep"]["measure"] |= {"temperatures": [0.0]}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heads") / "runs"


@pytest.fixture
def config(corpus: Path, storage: Path) -> Config:
    return toy_config(corpus, storage, headed)


def test_from_the_target_to_the_report(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Path(config.storage)
    report = run_pipeline(config)
    summary = json.loads(report.read_text())
    assert summary["lossless"]["exact"] == summary["lossless"]["prompts"] == 2
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] == 6
    assert "one layer over the target&#39;s hidden states" in report.with_name("report.html").read_text()
    rows = read_all(artifact(storage, "sweep") / "rows", PromptRow)
    heads = [row for row in rows if row.cell.drafter == "multi_view"]
    assert {row.cell.kind for row in heads} == {"head"}
    assert {row.mode for row in heads} == {"replay", "estimate", "measure"}
    assert any(row.counts.num_accepted for row in heads)
    labels = artifact(storage, "teach") / "labels"
    stored = np.load(labels / "shard-00000.features.npy", mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape[1:] == (96, 3 * 32)
    names = {path.name for path in (artifact(storage, "drafter-multi_view") / "model").iterdir()}
    assert {"model.safetensors", "draft_vocabulary.json", "config.json"} <= names
    shapes, facts = known(config)
    written = sum(np.load(file).nbytes for file in labels.glob("*.npy"))
    assert label_bytes(config, facts.labelled, 0, facts.vocab, 3 * 32) == written
    weights = load_file(artifact(storage, "drafter-multi_view") / "model" / "model.safetensors")
    assert shapes["drafter"].trained == sum(value.numel() for value in weights.values())
    assert all(part.flops > 0 for part in work(config, shapes, facts.labelled, 0, facts.prompts))
    monkeypatch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
    run_pipeline(config)  # finds everything


def test_features_that_are_stored_and_given_anew_train_alike(
    config: Config, corpus: Path, storage: Path
) -> None:
    """But for half precision: the same losses and curves."""
    run_pipeline(config, "train")

    def anew(values: dict[str, Any]) -> None:
        headed(values)
        values["labels"] |= {"features": "recomputed"}

    run_pipeline(toy_config(corpus, storage, anew), "train")
    stored, given = sorted(storage.glob("drafter-multi_view-*"), key=lambda path: path.stat().st_mtime)
    for row, other in zip(losses(stored), losses(given), strict=True):
        assert row == pytest.approx(other, rel=0.02, abs=0.01)
    taught = max(storage.glob("teach-*"), key=lambda path: path.stat().st_mtime)
    assert not list(taught.rglob("*features*"))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_workers_train_it_as_one_does(
    config: Config, corpus: Path, storage: Path, tmp_path: Path, stage: int
) -> None:
    """Under every ZeRO stage: the same losses, curves and weights as in one process."""
    run_pipeline(config, "train")
    whole = max(storage.glob("drafter-multi_view-*"), key=lambda path: path.stat().st_mtime)

    def sharded(values: dict[str, Any]) -> None:
        headed(values)
        values["train"] |= {
            "num_workers": 2, "micro_batch_sequences": 2, "deepspeed": f"conf/deepspeed/zero{stage}.json",
        }  # fmt: skip
        values["run"] = {"executor": "ray", "device": "cpu"}

    shared = tmp_path / "runs"
    shutil.copytree(storage, shared, ignore=shutil.ignore_patterns("drafter-*", "sweep-*", "report-*"))
    run_pipeline(toy_config(corpus, shared, sharded), "train")
    (other,) = shared.glob("drafter-multi_view-*")
    assert_same_run(other, whole)


def test_a_finished_head_continues_prompts(config: Config) -> None:
    """`generate` and other programs: greedily the target's own text, token for token."""
    run_pipeline(config, "train")
    done = completed(config)
    pair = load_pair(done.target, done.drafters["multi_view"], done.tokenizer)
    prompts = ["Once upon a time there was a river.", "The lamp in the garden"]
    told = pair.continue_prompts(prompts, "streaming", 16, 3, 12)
    plain = AutoModelForCausalLM.from_pretrained(done.target.path, attn_implementation="eager").eval()
    for prompt, text in zip(prompts, told, strict=True):
        tokens = torch.tensor([encode_prompt(pair.tokenizer, prompt)])
        written = plain.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert text == pair.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)
