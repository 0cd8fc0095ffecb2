"""Stage sweep: which prompts are replayed and measured, on which workers."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path
from typing import Literal

from jobs.executor import Executor
from jobs.train import drafter_ref, model_identity, target_ref
from pipeline.artifacts import Artifact, open_artifact, read_rows
from pipeline.cells import Drafter, chosen_drafter
from pipeline.config import Config
from pipeline.evaluate import Evaluator, SweepTask
from pipeline.models import ModelRef, own_positions, pick_device
from pipeline.rows import Prompt

log = logging.getLogger(__name__)

PROMPTS_PER_TASK = 8


def sweep(
    config: Config,
    executor: Executor,
    prepare: Artifact,
    teach: Artifact,
    scratch: dict[str, Artifact],
    trained: dict[str, Artifact],
) -> tuple[Artifact, int]:
    """Evaluate every drafter; returns the artifact and the number of failures.

    With failures the artifact stays incomplete, and the next run tries them again.
    """
    wanted = config.sweep.drafters
    names = [d.name for d in config.train.drafters if chosen_drafter(d.name, wanted)]
    inputs = {
        "teach": teach.fingerprint,
        "target": model_identity(config.target, scratch.get("target")),
        "drafters": {name: trained[name].fingerprint for name in names},
        "drafter_dtype": config.drafter.dtype,
        "sweep": config.sweep.model_dump(mode="json", exclude={"num_evaluators"}),
        # Wall clock belongs to a device. As configured: the driver may lack the GPU that its workers have.
        "device": config.run.device,
        "kernels": config.run.kernels,
        "decode": config.decode.model_dump(mode="json"),
    }
    artifact = open_artifact(Path(config.storage), "sweep", inputs)
    if artifact.complete:
        return artifact, 0
    began = time.perf_counter()
    drafters = [Drafter(n, ref(config, trained[n]), positions(config, scratch, n)) for n in names]
    factory = partial(
        make_evaluator, config, target_ref(config, scratch), drafters, prepare.path / "tokenizer"
    )
    rows = failures = 0
    modes = {"both": ("replay", "measure"), "replay": ("replay",), "measure": ("measure",)}
    for mode in modes[config.sweep.mode]:
        tasks = sweep_tasks(config, mode, prepare, teach, artifact)  # type: ignore[arg-type]
        # Timings are taken by one worker at a time, so that they do not disturb each other.
        actors = config.sweep.num_evaluators if mode == "replay" else 1
        for _, (written, failed) in executor.map_actors(factory, tasks, mode, actors):
            rows, failures = rows + written, failures + failed
    if failures:
        log.error("sweep: %d failed; see %s", failures, artifact.path / "failed")
    else:
        artifact.finish(inputs, {"rows": rows}, time.perf_counter() - began)
    return artifact, failures


def make_evaluator(config: Config, target: ModelRef, drafters: list[Drafter], tokenizer: Path) -> Evaluator:
    return Evaluator(config, target, drafters, tokenizer, pick_device(config.run.device))


def ref(config: Config, trained: Artifact) -> ModelRef:
    """A trained drafter; its folder holds its rope parameters already."""
    trust = config.drafter.kind == "pretrained" and config.drafter.trust_remote_code
    return ModelRef(str(trained.path / "model"), dtype=config.drafter.dtype, trust_remote_code=trust)


def positions(config: Config, scratch: dict[str, Artifact], name: str) -> int:
    """Positions that a drafter was trained on, by its own pretraining or by ours."""
    variant = next(v for v in config.train.drafters if v.name == name)
    steps = config.train.steps if variant.steps is None else variant.steps
    if config.drafter.kind == "scratch":
        pretrain = config.drafter.pretrain
        own = (pretrain.sequence_tokens or config.data.sequence_tokens) if pretrain.steps else 0
    else:
        own = own_positions(drafter_ref(config, scratch))
    return max(own, config.data.sequence_tokens if steps else 0)


def sweep_tasks(
    config: Config, mode: Literal["replay", "measure"], prepare: Artifact, teach: Artifact, artifact: Artifact
) -> list[SweepTask]:
    """Slices of every test prompts file; measuring takes the first prompts, those decoded together a task."""
    tasks = []
    for file in sorted((prepare.path / "prompts").glob("test-*.jsonl")):
        count = len(read_rows(file, Prompt))
        size = PROMPTS_PER_TASK
        if mode == "measure":
            count, size = min(count, config.sweep.measure.prompts), config.sweep.measure.prompts_together
        for first, last in [(at, min(at + size, count)) for at in range(0, count, size)]:
            name = f"{mode}-{file.stem.removeprefix('test-')}-{first:05d}.jsonl"
            tasks.append(
                SweepTask(
                    mode,
                    file,
                    teach.path / "continuations" / file.name,
                    first,
                    last,
                    artifact.path / "rows" / name,
                )
            )
    return tasks
