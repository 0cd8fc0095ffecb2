"""ZeRO at every stage and over several ranks: the losses of one process, and checkpoints for any of them."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from jobs.executors.inline import InlineExecutor
from pipeline.config.models import FirstLayers
from pipeline.models.load import layers_ref
from pipeline.store.files import write_rows
from pipeline.train.checkpoints import PARTS, checkpoint_folder
from pipeline.train.job import TrainJob, run_job
from pipeline.train.target.teacher import AnswerTask, Teacher
from tests.helpers.group import copy_state, run_group, train
from tests.helpers.paths import ROOT
from tests.helpers.tiny import TRAIN, Workshop, assert_same_run, losses, tiny_config, tiny_prompts

SETTINGS = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
BACK = ("zero1", "zero3")  # whose sharded states one process goes on from
# Four micro-batches a step: four, two or one for each worker.
BATCH: dict[str, Any] = {"train.batch_sequences": 8, "train.steps": 8}
PRETRAIN = {"steps": 2, "batch_sequences": 8}
SCRATCH = {"target.pretrain": PRETRAIN, "drafter.pretrain": PRETRAIN}
LAYERS: dict[str, Any] = {"target.pretrain": PRETRAIN, "drafter": {"kind": "first_layers", "layers": [1]}}
LAYERS["train.draft_vocabulary"] = 40


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, make_model: Any) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("zero"), target, make_model(layers=1, seed=7))


@pytest.fixture(scope="module")
def inline(workshop: Workshop) -> Path:
    """One process without DeepSpeed; checkpoints of steps 5 and 8 stay."""
    return workshop.train("inline", BATCH | SCRATCH)


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel) -> Workshop:
    """Its drafter is a layer of its target, between what is frozen."""
    workshop = Workshop(tmp_path_factory.mktemp("layered"), target, target)
    workshop.drafter = layers_ref(workshop.target, FirstLayers.model_validate(LAYERS["drafter"]))
    return workshop


def zero_job(workshop: Workshop, settings: str, workers: int, kind: str) -> TrainJob:
    changes = {
        "train.deepspeed": str(ROOT / f"conf/deepspeed/{settings}.json"),
        "train.num_workers": workers,
    }
    models = LAYERS if workshop.drafter.layers else SCRATCH
    return workshop.job(f"{settings}-{workers}-{kind}", BATCH | models | changes)


def folder_of(job: TrainJob) -> Path:
    return job.outputs["multi_view"]


def begin_at_5(job: TrainJob, source: Path) -> TrainJob:
    """Give a job another run's checkpoint of step 5 and its log."""
    checkpoint = checkpoint_folder(folder_of(job), 5)
    shutil.copytree(checkpoint_folder(source, 5), checkpoint)
    shutil.copy(source / "metrics.jsonl", folder_of(job))
    return job


def assert_zero_is_one_process(
    workshop: Workshop, inline: Path, workers: int, settings: Sequence[str]
) -> None:
    whole = {name: zero_job(workshop, name, workers, "whole") for name in settings}
    resumed = {name: begin_at_5(zero_job(workshop, name, workers, "resumed"), inline) for name in settings}
    copies = {name: workshop.folder / f"{name}-{workers}-copy" for name in settings}
    begin = folder_of(begin_at_5(zero_job(workshop, "zero1", workers, f"source-of-{settings[0]}"), inline))
    run_group(
        workers,
        [partial(train, job) for job in (*whole.values(), *resumed.values())]
        + [partial(copy_state, whole[name], begin, copies[name]) for name in settings],
    )
    for name in settings:
        assert_same_run(folder_of(whole[name]), inline)
        assert_same_run(folder_of(resumed[name]), inline)
        memory = json.loads((folder_of(whole[name]) / "memory.json").read_text())
        assert memory["device"] == "cpu" and len(memory["ranks"]) == workers
        assert all(2**26 < peak < 2**36 for peak in memory["ranks"]), "bytes of a process with torch"
        for part in PARTS:
            start = load_file(checkpoint_folder(inline, 5) / f"{part}.safetensors")
            copied = load_file(checkpoint_folder(copies[name], 5) / f"{part}.safetensors")
            trained = load_file(checkpoint_folder(folder_of(whole[name]), 5) / f"{part}.safetensors")
            assert start.keys() == copied.keys() == trained.keys()
            for key, value in start.items():
                where = f"{name} {part} {key}"
                assert torch.equal(copied[key], value), f"{where} changed between load and save"
                torch.testing.assert_close(trained[key], value, atol=1e-4, rtol=1e-3, msg=where)
    # The way back: one process goes on from sharded states.
    for name in set(BACK) & set(settings):
        back = begin_at_5(zero_job(workshop, name, workers, "back"), folder_of(whole[name]))
        InlineExecutor(back.config).train(run_job, back)
        assert_same_run(folder_of(back), inline)


def test_two_ranks(workshop: Workshop, inline: Path) -> None:
    assert_zero_is_one_process(workshop, inline, 2, BACK)


@pytest.mark.slow
def test_a_drafter_of_the_targets_layers(layered: Workshop, target: PreTrainedModel) -> None:
    """At ZeRO's stages what is frozen stays to the bit, and is in no checkpoint."""
    inline = layered.train("inline", BATCH | LAYERS)
    assert_zero_is_one_process(layered, inline, 2, [*BACK, "zero2"])
    kept = load_file(checkpoint_folder(inline, 5) / "weights.safetensors")
    assert kept and all(name.startswith("model.layers.0.") for name in kept)
    trained = load_file(inline / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(trained[name], target.state_dict()[name]), name
    assert not torch.equal(
        trained["model.layers.0.mlp.up_proj.weight"], target.state_dict()["model.layers.1.mlp.up_proj.weight"]
    )


def count_engines(job: TrainJob) -> None:
    """Train both variants of a job, and leave in their folder how many engines this process still holds."""
    import deepspeed

    train(job)
    gc.collect()
    held = sum(isinstance(found, deepspeed.DeepSpeedEngine) for found in gc.get_objects())
    (folder_of(job).parent / f"held-{torch.distributed.get_rank()}").write_text(str(held))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_one_engine_after_another_is_let_go(workshop: Workshop, stage: int) -> None:
    variants = [{"name": name, "budgets": {16: 1}} for name in ("first", "multi_view")]
    settings = {"train.deepspeed": str(ROOT / f"conf/deepspeed/zero{stage}.json"), "train.variants": variants}
    job = workshop.job(f"let-go-{stage}", BATCH | SCRATCH | settings | {"train.steps": 2})
    run_group(1, [partial(count_engines, job)])
    assert (folder_of(job).parent / "held-0").read_text() == "0"


@pytest.mark.slow
def test_answers_of_several_lengths(tmp_path: Path, make_model: Any) -> None:
    """Of one window or two, beside plain text: ZeRO-3 counts on equal passes in every rank."""
    target = make_model(layers=2, seed=3)
    target.generation_config.eos_token_id = list(range(3, 12))  # ends some texts early
    workshop = Workshop(tmp_path, target, make_model(layers=1, seed=7))
    changes = SCRATCH | {
        "data.sources": [
            {"kind": "text", "name": "code", "files": ["x"], "ask": "What?\n\n{text}",
             "training_prompts": {40: 8}}
        ],
        "train.window_tokens": 12, "train.windows": 2, **BATCH,
    }  # fmt: skip
    prompts = [
        tiny_prompts("train", 1, 24 + 4 * number, 24, seed=number)[0].model_copy(
            update={"prompt_id": str(number)}
        )
        for number in range(8)
    ]
    write_rows(workshop.prepare / "asked" / "train-code-40.jsonl", prompts)
    folders = (workshop.prepare / "tokenizer", workshop.teach, torch.device("cpu"))
    Teacher(tiny_config(TRAIN | changes), workshop.target, *folders)(
        AnswerTask(workshop.prepare / "asked" / "train-code-40.jsonl", 0, len(prompts), 0)
    )
    lengths = np.load(next((workshop.teach / "labels").glob("answers-*.supervised.npy")))
    assert min(lengths) <= 12 < max(lengths), "answers of one window and of two"
    inline = workshop.train("inline", changes)
    jobs = []
    for stage in (2, 3):
        settings = str(ROOT / f"conf/deepspeed/zero{stage}.json")
        more = {"train.deepspeed": settings, "train.num_workers": 2}
        jobs.append(workshop.job(f"zero{stage}", changes | more))
    run_group(2, [partial(train, job) for job in jobs])
    for job in jobs:
        assert_same_run(folder_of(job), inline)


PATH = {"name": "multi_view", "budgets": {16: 0.6, 32: 0.4}, "path": {"every": 2, "paths": 2, "length": 3}}
HEADED: dict[str, Any] = {
    "target.layers": 4, "target.pretrain": PRETRAIN, "labels.features": "recomputed", "train.chain_steps": 2,
    "drafter": {"kind": "head", "feature_layers": [1, 2, 3]}, "train.draft_vocabulary": 40,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lm", "head"])
def test_the_path_term(tmp_path: Path, make_model: Any, kind: str) -> None:
    """Every rank asks the whole target, and makes as many passes as the others in steps of both kinds."""
    workshop = Workshop(tmp_path, make_model(layers=4, seed=3), make_model(layers=1, seed=7))
    models = SCRATCH
    if kind == "head":
        models, workshop.drafter = HEADED, workshop.target
    changes = BATCH | models | {"train.variants": [PATH]}
    inline = workshop.train("inline", changes)
    jobs = []
    for stage in (1, 3):
        settings = str(ROOT / f"conf/deepspeed/zero{stage}.json")
        jobs.append(
            workshop.job(f"zero{stage}", changes | {"train.deepspeed": settings, "train.num_workers": 2})
        )
    run_group(2, [partial(train, job) for job in jobs])
    for job in jobs:
        assert_same_run(folder_of(job), inline)
    assert all(row["loss/path"] > 0 for row in losses(inline) if "loss/path" in row)


@pytest.mark.slow
def test_two_ranks_at_every_stage(workshop: Workshop, inline: Path) -> None:
    assert_zero_is_one_process(workshop, inline, 2, [name for name in SETTINGS if name not in BACK])


@pytest.mark.long
def test_four_ranks(workshop: Workshop, inline: Path) -> None:
    assert_zero_is_one_process(workshop, inline, 4, SETTINGS)
