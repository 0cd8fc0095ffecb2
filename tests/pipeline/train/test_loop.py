"""The training loop: resumed = uninterrupted bit for bit, a plain loop's weights, and what stops it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, get_cosine_schedule_with_warmup

from jobs.executors.inline import InlineExecutor
from pipeline.config.models import Pretrain
from pipeline.errors import NotFinite
from pipeline.models.load import ModelRef, load_model, own_positions
from pipeline.observe.training import read_metrics
from pipeline.store.files import write_rows
from pipeline.train.batches import Shards
from pipeline.train.checkpoints import checkpoint_folder, latest
from pipeline.train.job import TrainJob, run_job
from pipeline.train.loop import Schedule, fit
from pipeline.train.objectives import MultiView, NextToken, next_token_loss
from tests.helpers.tiny import VOCABULARY, Workshop, losses, tiny_config, tiny_tokenizer, weights
from tests.helpers.training import CPU, Line, schedule_for, torch_engine

# ── the loop ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", [3, 7, 10, 11])
def test_resumed_is_uninterrupted_bit_for_bit(
    workshop: Workshop, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Stopped before, between, just after and just before a checkpoint, then run again."""
    whole = MultiView.loss

    def stop(self: MultiView, model: PreTrainedModel, step: int, micro: int) -> Any:
        if step == at and micro == 1:
            raise KeyboardInterrupt
        return whole(self, model, step, micro)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiView, "loss", stop)
        workshop.train(f"stopped-{at}")
    folder = workshop.folder / f"stopped-{at}" / "multi_view"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss/to')  # what a kill leaves
    assert not (folder / "model").exists()
    workshop.train(f"stopped-{at}")
    assert losses(folder) == losses(uninterrupted)
    ours, theirs = weights(folder), weights(uninterrupted)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_metrics_have_each_step_once(uninterrupted: Path) -> None:
    rows = read_metrics(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 5, 8, 10, 12]
    assert all(row["train/tokens_per_s"] > 0 for row in rows if "loss/total" in row)
    assert [row["step"] for row in rows if "validation/acceptance_b16" in row] == [4, 8, 12]
    assert [row["step"] for row in rows if "loss/sparse" in row] == [5, 10, 12]


def test_a_finished_run_is_left_alone(workshop: Workshop, uninterrupted: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*") if file.is_file()}
    workshop.train("uninterrupted")
    assert before == {file: file.stat().st_mtime_ns for file in uninterrupted.rglob("*") if file.is_file()}


def test_stopped_in_the_export_trains_no_further(
    workshop: Workshop, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pipeline.train.loop.export_model", stop)
        workshop.train("export")
    assert not (workshop.folder / "export" / "multi_view" / "model").exists()
    monkeypatch.setattr(MultiView, "loss", stop)
    folder = workshop.train("export")
    ours, theirs = weights(folder), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("every", "bad", "good"),
    [(5, (6,), 5), (3, (4, 5), 3), (20, (0,), None), (4, (11,), 8)],
)
def test_nan_stops_before_it_reaches_a_checkpoint(
    make_model: Any, tmp_path: Path, every: int, bad: tuple[int, ...], good: int | None
) -> None:
    schedule = schedule_for(12, checkpoint_every=every, learning_rate=1e-3)
    with pytest.raises(NotFinite) as told:
        fit(torch_engine(make_model(), schedule), Line(bad), schedule, tmp_path, "sad")
    text = str(told.value)
    assert f"training sad: step {bad[0] + 1} is the first that is not finite (line nan" in text
    batch = [line for line in text.splitlines() if "micro-batch" in line]
    assert batch == [f"  micro-batch {n}: row {n} of step {bad[0]}" for n in range(schedule.micro_batches)]
    kept = latest(tmp_path)
    assert f"last good checkpoint: {kept or 'none'}" in text
    assert kept == (None if good is None else checkpoint_folder(tmp_path, good))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    if good is not None:
        # The cause is gone: training goes on from the good checkpoint and ends well.
        fit(torch_engine(make_model(), schedule), Line(), schedule, tmp_path, "happy")
        assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 12


def test_a_half_written_checkpoint_does_not_count(make_model: Any, tmp_path: Path) -> None:
    schedule = schedule_for(4, checkpoint_every=2)
    fit(torch_engine(make_model(), schedule), Line(), schedule, tmp_path, "x")
    newer = checkpoint_folder(tmp_path, 6)
    newer.mkdir()
    (newer / "weights.safetensors").write_bytes(b"torn")
    assert latest(tmp_path) == checkpoint_folder(tmp_path, 4)


def test_the_learning_rate_by_hand() -> None:
    schedule = schedule_for(12, learning_rate=0.8, warmup_steps=4)
    assert [schedule.rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [schedule.rate(step) for step in (4, 8, 10)] == pytest.approx([0.8, 0.4, 0.8 * (1 - 2**-0.5) / 2])
    assert 0 < schedule.rate(11) < 0.05 and schedule.rate(12) == pytest.approx(0)
    assert schedule_for(3, warmup_steps=0, learning_rate=1.0).rate(0) == 1.0
    assert schedule_for(3, warmup_steps=5, learning_rate=1.0).rate(2) == pytest.approx(0.6), "warm-up alone"


def test_the_cosine_is_transformers_own() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_cosine_schedule_with_warmup(optimizer, 6, 30)
    schedule, seen = schedule_for(30, learning_rate=0.5, warmup_steps=6), []
    for _ in range(30):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [schedule.rate(step) for step in range(6, 30)] == pytest.approx(seen[6:])


def test_the_logged_rate_is_the_one_used(uninterrupted: Path) -> None:
    schedule = schedule_for(12, learning_rate=3e-3, warmup_steps=3)
    rows = [row for row in read_metrics(uninterrupted / "metrics.jsonl") if "loss/total" in row]
    assert [row["train/learning_rate"] for row in rows] == [schedule.rate(step) for step in (4, 9, 11)]


# ── gradients and precision ───────────────────────────────────────────────────────────────────────


def next_token(workshop: Workshop, micro: int, compile: bool = False) -> tuple[NextToken, Schedule]:
    group = Pretrain(steps=5, batch_sequences=4, learning_rate=2e-3, warmup_steps=2, compile=compile)
    changes = {"train.micro_batch_sequences": micro, "train.clip": 0.5, "train.checkpoint_every": 99}
    pretrain = {f"{model}.pretrain.batch_sequences": 4 for model in ("target", "drafter")}
    config = tiny_config(changes | pretrain)
    tokens = Shards([workshop.prepare / "sequences" / "train-00000.npy"])
    return NextToken(config, group, tokens, [], CPU), Schedule(group, config.train, 5)


def test_accumulated_micro_batches_are_one_batch_and_a_plain_loop(
    workshop: Workshop, make_model: Any, tmp_path: Path
) -> None:
    trained = {}
    for micro in (1, 2, 4):
        objective, schedule = next_token(workshop, micro)
        model = make_model(seed=3)
        fit(torch_engine(model, schedule), objective, schedule, tmp_path / str(micro), "x")
        trained[micro] = model.state_dict()

    plain = make_model(seed=3)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-3, weight_decay=0.01)
    rates = [1e-3, 2e-3, 2e-3, 2e-3 * 0.75, 2e-3 * 0.25]
    array = np.load(workshop.prepare / "sequences" / "train-00000.npy").astype(np.int64)
    order = np.concatenate([np.random.default_rng([42, epoch]).permutation(16) for epoch in range(2)])
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        next_token_loss(plain, torch.from_numpy(array[order[4 * step : 4 * step + 4]])).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    for state in trained.values():
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(state[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_compiled_step_is_the_plain_one(
    workshop: Workshop, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients, from one whole graph, without generating code for it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    objective, _ = next_token(workshop, micro=2, compile=True)
    plain, _ = next_token(workshop, micro=2)
    assert objective.step_loss is not next_token_loss and plain.step_loss is next_token_loss
    models = [make_model(layers=1, seed=3), make_model(layers=1, seed=3)]
    values = [one.loss(model, 0, 0)[0] for one, model in zip((objective, plain), models, strict=True)]
    torch.testing.assert_close(values[0], values[1])
    for value in values:
        value.backward()
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_bfloat16_keeps_fp32_weights_and_similar_losses(workshop: Workshop, uninterrupted: Path) -> None:
    folder = workshop.train("bfloat16", {"train.dtype": "bfloat16"})
    assert all(value.dtype == torch.float32 for value in weights(folder).values())
    ours, exact = losses(folder), losses(uninterrupted)
    assert [row["step"] for row in ours] == [row["step"] for row in exact]
    for row, other in zip(ours, exact, strict=True):
        if "loss/total" in row:
            assert row["loss/total"] == pytest.approx(other["loss/total"], rel=0.05)
            assert row["loss/total"] != other["loss/total"]


def test_training_lowers_the_loss(workshop: Workshop) -> None:
    folder = workshop.train(
        "longer", {"train.steps": 60, "train.learning_rate": 1e-2, "train.checkpoint_every": 99}
    )
    rows = [row["loss/total"] for row in losses(folder) if "loss/total" in row]
    assert rows[-1] < 0.8 * rows[0]


# ── export ────────────────────────────────────────────────────────────────────────────────────────


def test_the_export_loads_with_plain_transformers(workshop: Workshop, uninterrupted: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(uninterrupted / "model").eval()
    ours = load_model(ModelRef(str(uninterrupted / "model")), VOCABULARY)
    state = load_file(checkpoint_folder(uninterrupted, 12) / "weights.safetensors")
    for name, value in plain.named_parameters():
        assert torch.equal(value, state[name]), name
    tokens = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        logits = plain(input_ids=tokens).logits
        torch.testing.assert_close(ours(input_ids=tokens).logits, logits, atol=1e-4, rtol=1e-4)
    start = load_file(Path(workshop.drafter.path) / "model.safetensors")
    assert any(not torch.equal(start[name], state[name]) for name in start)
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "model")
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_the_card_says_what_it_was_trained_for(uninterrupted: Path) -> None:
    card = (uninterrupted / "model" / "README.md").read_text()
    last = read_metrics(uninterrupted / "metrics.jsonl")[-1]
    assert "`multi_view`" in card and "16: 0.6" in card and "code (text)" in card and "scratch target" in card
    for budget in ("b16", "full"):
        assert f"| {budget} | {last[f'validation/acceptance_{budget}']:.3f} |" in card


def test_no_steps_export_the_start(workshop: Workshop) -> None:
    variant = {"name": "untrained", "steps": 0, "budgets": {16: 1.0}}
    folder = workshop.train("untrained", {"train.variants": [variant]})
    start = load_file(Path(workshop.drafter.path) / "model.safetensors")
    ours = weights(folder)
    assert ours.keys() == start.keys() and all(torch.equal(ours[name], start[name]) for name in start)
    assert "exported as it was, untrained" in (folder / "model" / "README.md").read_text()


def test_rope_scaling_is_trained_and_exported(workshop: Workshop) -> None:
    scaled = replace(workshop.drafter, rope_scaling={"rope_type": "linear", "factor": 4.0})
    job = replace(workshop.job("long"), drafter=scaled)
    InlineExecutor(job.config).train(run_job, job)
    written = json.loads((job.outputs["multi_view"] / "model" / "config.json").read_text())
    assert written["rope_parameters"]["rope_type"] == "linear"
    assert written["rope_parameters"]["factor"] == 4.0


def test_scratch_models_are_pretrained_apart(workshop: Workshop, tmp_path: Path) -> None:
    """Target and drafter of one shape start from different numbers; a second run gives the same again."""
    config = tiny_config({"drafter": tiny_config().target.model_dump()})
    for run in ("one", "two"):
        outputs = {name: tmp_path / run / name for name in ("target", "drafter")}
        InlineExecutor(config).train(run_job, TrainJob(config, outputs, workshop.prepare))
    one, two = (
        {name: weights(tmp_path / run / name) for name in ("target", "drafter")} for run in ("one", "two")
    )
    for name in one:
        assert all(torch.equal(one[name][key], two[name][key]) for key in one[name])
    key = "model.embed_tokens.weight"
    assert float((one["target"][key] - one["drafter"][key]).norm()) > 0.5 * float(one["target"][key].norm())
    assert "loss/next_token" in read_metrics(tmp_path / "one" / "target" / "metrics.jsonl")[-1]
    assert own_positions(ModelRef(str(tmp_path / "one" / "target" / "model"))) == 256


def test_prompts_and_continuations_must_pair(workshop: Workshop, tmp_path: Path) -> None:
    from pipeline.train.job import validation_pairs

    pairs = validation_pairs(workshop.prepare, workshop.teach)
    assert (
        [p.prompt_id for p, _ in pairs] == [c.prompt_id for _, c in pairs] == ["validation-0", "validation-1"]
    )
    (name,) = (file.name for file in (workshop.prepare / "prompts").glob("validation-*.jsonl"))
    write_rows(tmp_path / "continuations" / name, [pairs[0][1]])
    with pytest.raises(ValueError, match="shorter"):
        validation_pairs(workshop.prepare, tmp_path)
