"""The memory that each stage takes on the device, and what to lower where it does not fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from jobs.executors.ray_train import read_settings
from jobs.plan.facts import Facts
from pipeline.config.models import ScratchModel
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.models.load import pick_device
from pipeline.plan.rates import timed_step
from pipeline.plan.shapes import Device, Memory, Shape, Sharding, sharding_of
from pipeline.plan.sweep_memory import measure_memory, replay_memory
from pipeline.plan.train_memory import pretrain_memory, teach_memory, train_memory

# Resident bytes of imports that a plan does without, measured on Linux with the pinned versions.
MLFLOW_BYTES, RAY_BYTES = 100_000_000, 70_000_000
CUDA_BYTES = 600_000_000  # context and cuBLAS workspaces of one process
SMALL = ScratchModel.model_validate(
    {"kind": "scratch", "layers": 1, "hidden": 32, "heads": 2, "kv_heads": 2, "intermediate": 64,
     "max_positions": 64, "pretrain": {"steps": 1}}
)  # fmt: skip
# What to lower where a stage does not fit, in the order in which it is tried.
FIELDS = {
    **{
        f"pretrain {role}": (
            "train.micro_batch_sequences",
            "train.num_workers",
            f"{role}.pretrain.sequence_tokens",
            "data.sequence_tokens",
        )
        for role in ("target", "drafter")
    },
    "teach": ("labels.batch_sequences", "labels.num_workers", "data.sequence_tokens"),
    "train": (
        "train.micro_batch_sequences",
        "train.num_workers",
        "train.max_logits_mib",
        "train.windows",
        "data.sequence_tokens",
    ),
    "sweep replay": ("sweep.num_evaluators", "decode.prefill_chunk", "data.max_new_tokens"),
    "sweep measure": ("sweep.measure.prompts_together", "decode.prefill_chunk", "data.max_new_tokens"),
}


def device_of(config: Config) -> Device:
    """The device of `run.device`, and what a process takes before its work: imports and a first small step.

    Without the GPU that the config names, its costs are those of a GPU all the same.
    """
    if config.run.device == "cuda" or pick_device(config.run.device).type == "cuda":
        return Device("cuda", CUDA_BYTES)
    timed_step(SMALL, 300, 32, "cpu")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    imports = RAY_BYTES if config.run.executor == "ray" else MLFLOW_BYTES * config.tracking.enabled
    return Device("cpu", resident + imports)


def device_memory(kind: str) -> int | None:
    """Bytes of the device here: of the GPU, or of the machine; None for a GPU that is not here."""
    if kind == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory(config: Config, shapes: Mapping[str, Shape], facts: Facts, device: Device) -> list[Memory]:
    """The peak of every stage that does something; of training, that of the largest variant."""
    train, sweep = config.train, config.sweep
    sharding = Sharding()
    if config.run.executor == "ray":
        sharding = sharding_of(read_settings(train.deepspeed), train.num_workers)

    def at_once(peak: Memory, workers: int, work: Work) -> Memory:
        """On a CPU the workers of a stage share the machine, on GPUs by what they ask for."""
        if config.run.executor == "inline":
            workers = 1
        elif device.kind == "cuda":
            share = config.run.needs(work).gpus or 0.0
            workers = min(workers, int(1 / share) if 0 < share < 1 else 1)
        return replace(peak, processes=workers)

    peaks = [
        at_once(pretrain_memory(config, role, shape, sharding, device), train.num_workers, "train")
        for role, shape in shapes.items()
        if isinstance(spec := getattr(config, role), ScratchModel) and spec.pretrain.steps
    ]
    most = max(config.data.validation_prompts, *facts.prompts.values())
    peaks.append(
        at_once(teach_memory(config, shapes["target"], most, device), config.labels.num_workers, "teach")
    )
    steps = [train.steps if variant.steps is None else variant.steps for variant in train.drafters]
    trained = [
        train_memory(config, variant, sum(steps), shapes["drafter"], sharding, device)
        for variant, own in zip(train.drafters, steps, strict=True)
        if own
    ]
    if trained:
        peaks.append(at_once(max(trained, key=lambda peak: peak.each), train.num_workers, "train"))
    if sweep.mode != "measure":
        peaks.append(at_once(replay_memory(config, shapes, device), sweep.num_evaluators, "replay"))
    if sweep.mode != "replay":
        peaks.append(measure_memory(config, shapes, facts.prompts, device))
    return peaks


def memory_problems(
    config: Config, shapes: Mapping[str, Shape], facts: Facts, device: Device, limit: int | None
) -> list[str]:
    """One line for each stage that needs more than `limit`, with the first field whose change helps."""
    problems = []
    for place, peak in enumerate(memory(config, shapes, facts, device)):
        if limit is None or peak.total <= limit:
            continue
        fields = next(fields for stage, fields in FIELDS.items() if peak.stage.startswith(stage))
        advice = f"none of {', '.join(fields)} alone makes it fit; a smaller model or more memory would"
        for field, value, changed in ((f, *change) for f in fields for change in lowered(config, f)):
            after = memory(changed, shapes, facts, device)[place].total
            if after <= limit:
                advice = f"set {field}={value}, with which it takes {after / 1e9:.1f} GB"
                break
        problems.append(
            f"stage {peak.stage} needs {peak.total / 1e9:.1f} GB of {device.kind} memory, and there are "
            f"{limit / 1e9:.1f} GB: {advice}"
        )
    return problems


def lowered(config: Config, field: str) -> Iterator[tuple[int, Config]]:
    """The config with a field halved, and halved again, as long as that is valid."""
    values = config.model_dump(mode="python")
    *path, name = field.split(".")
    group = values
    for part in path:
        group = group[part]
    value = config.data.sequence_tokens if group[name] is None else group[name]
    while (value := value // 2) >= 1:
        group[name] = value
        with suppress(ValueError):
            yield value, Config.model_validate(values)
