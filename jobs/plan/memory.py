"""The memory that each stage takes on the device, and what to lower where it does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from typing import Any

from jobs.executors.ray_train import read_settings
from jobs.plan.facts import Facts
from pipeline.config.files import apply_override
from pipeline.config.models import Role, ScratchModel
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.hardware import Device, resident_bytes
from pipeline.models.load import pick_device
from pipeline.models.shape import Shape
from pipeline.plan.peaks import Memory
from pipeline.plan.rates import timed_step
from pipeline.plan.sweep_memory import measure_memory, replay_memory
from pipeline.plan.train_memory import pretrain_memory, teach_memory, train_memory, with_target
from pipeline.train.sharding import Sharding, sharding_of

# Resident bytes of imports that stages need and a plan does not, measured on Linux with the pinned versions.
MLFLOW_BYTES, RAY_BYTES = 100_000_000, 70_000_000
CUDA_BYTES = 600_000_000  # context and cuBLAS workspaces of one process
SMALL = ScratchModel.model_validate(
    {"kind": "scratch", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "intermediate": 64,
     "max_positions": 64, "pretrain": {"steps": 1}}
)  # fmt: skip
# What to lower where a stage does not fit, in the order in which it is tried.
STEP = ("train.micro_batch_sequences", "train.num_workers")
DECODING = ("decode.prefill_chunk", "data.max_new_tokens")
FIELDS = {
    "pretrain target": (*STEP, "target.pretrain.sequence_tokens", "data.sequence_tokens"),
    "pretrain drafter": (*STEP, "drafter.pretrain.sequence_tokens", "data.sequence_tokens"),
    "teach": ("labels.batch_sequences", "labels.num_workers", "data.sequence_tokens"),
    "train": (*STEP, "train.max_logits_mib", "train.windows", "data.sequence_tokens"),
    "sweep replay": ("sweep.num_evaluators", *DECODING),
    "sweep measure": ("sweep.measure.prompts_together", *DECODING),
}


def device_of(config: Config) -> Device:
    """The device of `run.device`, and what a process holds before its work: imports and a first small step.

    If the config names a GPU and there is none here, the costs are those of a GPU all the same.
    """
    if config.run.device == "cuda" or pick_device(config.run.device).type == "cuda":
        return Device("cuda", CUDA_BYTES)
    timed_step(SMALL, 300, 32, "cpu")
    imports = RAY_BYTES if config.run.executor == "ray" else MLFLOW_BYTES * config.tracking.enabled
    return Device("cpu", resident_bytes() + imports)


def memory(config: Config, shapes: Mapping[Role, Shape], facts: Facts, device: Device) -> list[Memory]:
    """The peak of every stage that has work to do; for training, the peak of the largest variant."""
    train, sweep, sharding = config.train, config.sweep, Sharding()
    if config.run.executor == "ray":
        sharding = sharding_of(read_settings(train.deepspeed), train.num_workers)
    stages: list[tuple[Memory, int, Work]] = [
        (pretrain_memory(config, role, shapes[role], sharding, device), train.num_workers, "train")
        for role, spec in config.scratch.items()
        if spec.pretrain.steps
    ]
    most = max(config.data.validation_prompts, *facts.prompts.values())
    stages.append((teach_memory(config, shapes["target"], most, device), config.labels.num_workers, "teach"))
    steps = sum(train.steps_of(variant) for variant in train.drafters)
    trained = []
    for variant in filter(train.steps_of, train.drafters):
        peak = train_memory(config, variant, steps, shapes["drafter"], sharding, device)
        trained.append(with_target(peak, config, variant, shapes, facts.labelled + facts.answers, device))
    if steps:
        stages.append((max(trained, key=lambda peak: peak.each), train.num_workers, "train"))
    if sweep.mode != "measure":
        stages.append((replay_memory(config, shapes, device), sweep.num_evaluators, "replay"))
    if sweep.mode != "replay":
        stages.append((measure_memory(config, shapes, facts.prompts, device), 1, "measure"))
    return [
        replace(peak, processes=config.run.at_once(work, workers, device.kind))
        for peak, workers, work in stages
    ]


def memory_problems(
    config: Config, shapes: Mapping[Role, Shape], facts: Facts, device: Device, limit: int | None
) -> Iterator[str]:
    """One line for each stage that needs more than `limit`, with the first field whose change helps."""
    for index, peak in enumerate(memory(config, shapes, facts, device)):
        if limit is None or peak.total <= limit:
            continue
        fields = next(fields for stage, fields in FIELDS.items() if peak.stage.startswith(stage))
        tried = (
            f"set {field}={value}, with which it takes {after / 1e9:.1f} GB"
            for field in fields
            for value, changed in lowered(config, field)
            if (after := memory(changed, shapes, facts, device)[index].total) <= limit
        )
        none = f"none of {', '.join(fields)} alone makes it fit; a smaller model or more memory would"
        yield (
            f"stage {peak.stage} needs {peak.total / 1e9:.1f} GB of {device.kind} memory, and there are "
            f"{limit / 1e9:.1f} GB: {next(tried, none)}"
        )


def lowered(config: Config, field: str) -> Iterator[tuple[int, Config]]:
    """The config with a field halved, and halved again, as long as that is valid."""
    values = config.model_dump(mode="python")
    value: Any = reduce(getattr, field.split("."), config)
    value = config.data.sequence_tokens if value is None else value
    while (value := value // 2) >= 1:
        apply_override(f"{field}={value}", values, {})
        with suppress(ValueError):
            yield value, Config.model_validate(values)
