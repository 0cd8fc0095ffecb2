"""What `budgetdraft plan` says, against what then happens."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, Qwen3Config, Qwen3ForCausalLM

from jobs import plan as planning
from jobs.pipeline import run_pipeline
from jobs.plan import Facts, facts_of, hours_of, memory, plan, shape_of, sweep_rows
from kernels import distill_loss
from pipeline import costs, measure, slots, teacher
from pipeline.artifacts import MANIFEST
from pipeline.config import Config, ScratchModel
from pipeline.costs import Device, Shape, Sharding
from pipeline.errors import BadData
from pipeline.models import build_scratch
from tests.configs import MINIMAL, SCRATCH
from tests.data.conftest import story

ROOT = Path(__file__).resolve().parent.parent
GPU = Device("cuda", 0)


def planned_config(
    folder: Path, storage: Path, change: Callable[[dict[str, Any]], object] | None = None
) -> Config:
    """Both modes over a few texts; `change` edits the values."""
    values = copy.deepcopy(MINIMAL) | {"storage": str(storage)}
    source = {"kind": "text", "name": "tales", "files": ["*.txt"], "validation_fraction": 0.1}
    values["data"] |= {
        "root": str(folder),
        "sources": [{**source, "test_fraction": 0.3}],
        "max_sequences": 40,
    }
    timed = {"drafters": ["multi_view"], "budgets": [16], "prompts": 2, "repeats": 1, "predict": False}
    values["sweep"] |= {"mode": "both", "measure": timed}
    values["labels"] = {"top_k": 3}
    if change:
        change(values)
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        (folder / f"tale{number:02d}.txt").write_text(story(number))
    return folder


def manifest(storage: Path, stage: str) -> dict[str, Any]:
    (file,) = storage.glob(f"{stage}-*/{MANIFEST}")
    return json.loads(file.read_text())["counts"]


def amounts(printed: str) -> dict[str, dict[str, Any]]:
    return {amount["name"]: amount for amount in json.loads(printed)["amounts"]}


def test_a_run_makes_what_was_planned(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planned_config(corpus, tmp_path, lambda v: v["data"].update(max_sequences=10_000))
    plan(config, as_json=True, memory_gb=None, tflops=None)
    guessed = amounts(capsys.readouterr().out)
    assert guessed["labelled sequences"]["how"].startswith("estimate: file sizes")
    run_pipeline(config, until="prepare")
    plan(config, as_json=True, memory_gb=None, tflops=None)
    known = amounts(capsys.readouterr().out)
    assert known["labelled sequences"]["how"] == known["labels on disk"]["how"] == "exact"
    assert guessed["labelled sequences"]["value"] == pytest.approx(
        known["labelled sequences"]["value"], rel=0.5
    )

    run_pipeline(config, until="sweep")
    taught = manifest(tmp_path, "teach")
    assert taught["sequences"] == known["labelled sequences"]["value"]
    files = list(tmp_path.glob("teach-*/labels/*.npy"))
    assert taught["label_bytes"] == known["labels on disk"]["value"] + 128 * len(files)  # and their headers
    rows = known["rows of replay"]["value"] + known["rows measured"]["value"]
    assert manifest(tmp_path, "sweep")["rows"] == rows > 0


def test_rows_by_hand(corpus: Path, tmp_path: Path) -> None:
    """2 data sets of 3 and 5 prompts at one context, 2 drafters, budgets 16, 32 and full."""

    def change(values: dict[str, Any]) -> None:
        (source,) = values["data"]["sources"]
        values["data"]["sources"].append({**source, "name": "more"})
        values["sweep"] |= {"temperatures": [0.0, 0.7], "seeds": [0, 1, 2], "gammas": [2, 4, 8]}

    config = planned_config(corpus, tmp_path, change)
    prompts = {"test-tales-64.jsonl": 3, "test-more-64.jsonl": 5, "validation-tales-64.jsonl": 9}
    facts = Facts(None, 40, 40, prompts, 300, "by hand")
    replayed, measured = sweep_rows(config, facts)
    texts = 1 + 3  # greedy, and each seed of sampling
    assert replayed == (3 + 5) * 2 * (3 + 3 + 1) * 3 * texts  # views, those of another prompt, and none
    assert measured == (2 + 2) * 1 * 1 * 3 * texts


# ── models ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", [{}, {"layers": 3, "kv_heads": 4, "hidden": 48, "heads": 8}])
def test_a_scratch_model_has_the_parameters_that_were_counted(change: dict[str, int]) -> None:
    spec = ScratchModel.model_validate({**SCRATCH, **change})
    model = build_scratch(spec, planning._Vocabulary(301), 0)
    shape = costs.scratch_shape(spec, 301)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape == costs.pretrained_shape(model.config, shape.parameters)


def test_a_pretrained_model_is_read_from_its_config_alone(corpus: Path, tmp_path: Path) -> None:
    given = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    given.save_pretrained(tmp_path / "model")
    spec = {"kind": "pretrained", "path": str(tmp_path / "model")}
    config = planned_config(corpus, tmp_path, lambda v: v.update(target=spec))
    weights = sum(weight.numel() for weight in Qwen3ForCausalLM(given).parameters())
    assert shape_of(config, "target") == Shape(weights, 2, 32, 64, 32, 48, 300)


def test_a_model_that_is_not_here_is_named_by_its_field(corpus: Path, tmp_path: Path) -> None:
    spec = {"kind": "pretrained", "path": "nobody/nothing-here"}
    config = planned_config(corpus, tmp_path, lambda v: v.update(drafter=spec))
    with pytest.raises(BadData, match=r"^drafter\.path = nobody/nothing-here: its config\.json is not on"):
        plan(config, as_json=False, memory_gb=None, tflops=None)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (None, 4000, 4000, 8000),
        (0, 4000, 4000, 8000),
        (1, 4000, 4000 + 1000 + 400, 3000),  # a quarter of moments and master weights
        (2, 4000, 1000 + 400, 3000),
        (3, 1000 + 800, 1000 + 400, 3000),  # 200 parameters are gathered at a time
    ],
)
def test_optimizer_state_by_hand(stage: int | None, weights: int, gradients: int, optimizer: int) -> None:
    """1000 parameters, 4 workers, a bucket of 100 elements."""
    sharding = Sharding(stage, 1 if stage is None else 4, bucket=100, live=200)
    assert sharding.state_bytes(1000, GPU) == (weights, gradients, optimizer)


def test_settings_of_deepspeed_are_read() -> None:
    settings = json.loads((ROOT / "conf/deepspeed/zero3.json").read_text())
    assert costs.sharding_of(settings, 2) == Sharding(3, 2)
    settings["zero_optimization"] |= {"reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu"}}
    offloaded = costs.sharding_of(settings, 2)
    assert offloaded == Sharding(3, 2, bucket=50_000_000, offload=True)
    assert offloaded.state_bytes(1000, GPU)[2] == 0


def test_kv_and_pretraining_by_hand(corpus: Path, tmp_path: Path) -> None:
    """GQA: 2 layers of 32 channels, 32 query and 16 key/value channels, 64 in the MLP."""
    shape = Shape(parameters=1000, layers=2, hidden=32, query=32, kv=16, intermediate=64, vocab=300)
    assert shape.kv_bytes(5) == 2 * 2 * 16 * 5 * 4
    peak = costs.pretrain_memory(planned_config(corpus, tmp_path), "target", shape, Sharding(), GPU)
    tokens = 2 * 96
    layer = 6 * 32 + 2 * 32 + 2 * 16 + 4 * 64
    assert peak.activations == tokens * 4 * (2 * layer + 2 * 64 + 2 * 32)
    assert peak.logits == 3 * tokens * 300 * 4
    assert peak.each == 16 * 1000 + peak.activations + peak.logits


def test_constants_are_those_of_the_code() -> None:
    assert costs.LABEL_POSITIONS == teacher.POSITIONS
    assert costs.LOGIT_COPIES == measure.LOGIT_COPIES
    assert costs.ROUND_SLOTS == slots.ROUND_SLOTS
    assert costs.LOSS_SCRATCH == distill_loss.SCRATCH_BYTES
    assert LlamaConfig().tie_word_embeddings is False  # counted by building, not by formula


@pytest.mark.parametrize(
    ("stage", "field", "value"),
    [("pretrain target", "train.micro_batch_sequences", 1), ("teach", "labels.batch_sequences", 2)],
)
def test_what_does_not_fit_is_refused_with_a_value_that_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, field: str, value: int
) -> None:
    monkeypatch.setattr(planning, "device_of", lambda config: GPU)

    def peak(change: dict[str, Any]) -> int:
        config = planned_config(corpus, tmp_path, lambda v: [v[g].update(c) for g, c in change.items()])
        shapes = {role: shape_of(config, role) for role in ("target", "drafter")}
        (found,) = [p for p in memory(config, shapes, facts_of(config, 300), GPU) if p.stage == stage]
        return found.total

    group, name = field.split(".")
    limit, unchanged = peak({group: {name: value}}), peak({})
    assert limit < unchanged
    config = planned_config(corpus, tmp_path)
    with pytest.raises(BadData) as refused:
        plan(config, as_json=False, memory_gb=limit / 1e9, tflops=1.0)
    assert f"stage {stage} needs" in str(refused.value)
    assert f"set {field}={value}, with which it takes" in str(refused.value)


def test_nothing_is_advised_where_nothing_helps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "device_of", lambda config: Device("cpu", 10**9))
    with pytest.raises(
        BadData, match=r"stage teach needs 1\.0 GB .* none of labels\.batch_sequences, .* alone"
    ):
        plan(planned_config(corpus, tmp_path), as_json=False, memory_gb=0.5, tflops=1.0)


def test_the_peak_of_a_real_process(tmp_path: Path) -> None:
    """Measured: the largest resident size of the stages up to teach, against the largest that was planned."""
    folder, storage = tmp_path / "texts", tmp_path / "runs"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number}.txt").write_text("".join(story(100 * number + k) for k in range(12)))

    def change(values: dict[str, Any]) -> None:
        values["data"] |= {"sequence_tokens": 1024}
        model = {"layers": 4, "hidden": 128, "intermediate": 384, "max_positions": 1024}
        values["target"] = {**SCRATCH, **model, "pretrain": {"steps": 3, "batch_sequences": 4}}
        values["train"] |= {"micro_batch_sequences": 4}
        values["drafter"] = {**values["drafter"], "pretrain": {"steps": 0, "batch_sequences": 4}}

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(planned_config(folder, storage, change).model_dump(mode="json")))

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], int]:
        """A command, and the largest resident bytes of its process."""
        call = [sys.executable, "-m", "jobs", *arguments]
        with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            out, error = process.stdout.read().decode(), process.stderr.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(call, process.returncode, out, error), usage.ru_maxrss * 1024

    refused, _ = run("plan", str(config), "--json", "--memory-gb", "0.001")
    assert refused.returncode == 3
    assert "stage pretrain target needs" in refused.stderr and "Traceback" not in refused.stderr
    planned = json.loads(refused.stdout)["memory"]
    assert not storage.exists()
    done, actual = run("teach", str(config))
    assert done.returncode == 0, done.stderr
    expected = max(peak["total"] for peak in planned if peak["stage"] in ("pretrain target", "teach"))
    assert expected - planned[0]["base"] > 0.25 * expected  # a test of more than the imports
    assert expected == pytest.approx(actual, rel=0.2)


# ── hours ─────────────────────────────────────────────────────────────────────────────────────────


def test_hours_by_hand_and_from_a_measured_step(corpus: Path, tmp_path: Path) -> None:
    config = planned_config(corpus, tmp_path)
    shapes = {role: shape_of(config, role) for role in ("target", "drafter")}
    facts = facts_of(config, 300)
    hours, _ = hours_of(config, shapes, facts, 2.0)
    assert hours is not None
    target, tokens = shapes["target"], 2 * 2 * 96  # steps × sequences × tokens, each seeing half of them
    flops = 3 * tokens * (2 * target.parameters + 4 * 2 * 32 * 48)
    assert hours["pretrain target"] == pytest.approx(flops / 2e12 / 3600)
    measured, how = hours_of(config, shapes, facts, None)
    assert measured is not None and measured.keys() == hours.keys()
    assert "measured here" in how and all(value > 0 for value in measured.values())
    rented = config.model_copy(update={"run": config.run.model_copy(update={"device": "cuda"})})
    assert hours_of(rented, shapes, facts, None)[0] is None
