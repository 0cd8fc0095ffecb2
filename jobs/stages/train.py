"""Stages pretrain and train: which models are missing, one launch of the workers, manifests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.executors.base import Executor
from pipeline.config.models import AnyModel, FirstLayers, Head, PretrainedModel
from pipeline.config.schema import Config
from pipeline.errors import Incomplete
from pipeline.models.hub import model_files
from pipeline.models.limits import longest_text
from pipeline.models.load import ModelRef, layers_ref, model_ref
from pipeline.models.shape import Shape
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.layout import MEMORY, METRICS, MODEL
from pipeline.train.checkpoints import CHECKPOINTS
from pipeline.train.job import TrainJob, run_job

# What a model's folder holds while it trains, in copies of its fp32 weights: the model itself, and two
# checkpoints of weights and two moments each, which stay until all models of the launch are trained.
TRAINED_COPIES = 1 + 2 * 3

# Makes the context that mirrors the growing metrics files of a launch while it runs.
Watch = Callable[[Mapping[str, Path]], AbstractContextManager[None]]


def unwatched(files: Mapping[str, Path]) -> AbstractContextManager[None]:
    return nullcontext()


def scratch_models(
    config: Config, prepare: Artifact
) -> tuple[dict[str, Artifact], dict[str, dict[str, Any]]]:
    """The folders of the scratch models, which need not exist yet, and the inputs that each depends on."""
    inputs: dict[str, dict[str, Any]] = {
        name: {
            "prepare": prepare.fingerprint,
            "model": spec,
            "seed": config.seed,
            "clip": config.train.clip,
            "dtype": config.train.dtype,
            "micro_batch_sequences": config.train.micro_batch_sequences,
        }
        for name, spec in config.scratch.items()
    }
    return {
        name: open_artifact(Path(config.storage), f"pretrain-{name}", given) for name, given in inputs.items()
    }, inputs


def pretrain(
    config: Config, executor: Executor, prepare: Artifact, watch: Watch = unwatched
) -> dict[str, Artifact]:
    """Pretrain the scratch models among target and drafter; {} where both are pretrained already."""
    artifacts, inputs = scratch_models(config, prepare)
    run_missing(executor, artifacts, inputs, TrainJob(config, {}, prepare.path), watch)
    return artifacts


def drafters(
    config: Config, teach: Artifact, scratch: dict[str, Artifact]
) -> tuple[dict[str, Artifact], dict[str, dict[str, Any]]]:
    """The folders of the drafters, which need not exist yet, and the inputs that each depends on."""
    common = config.train.model_dump(
        mode="json", exclude={"variants", "num_workers", "deepspeed", "checkpoint_every"}
    )
    inputs = {
        variant.name: {
            "teach": teach.fingerprint,
            "drafter": drafter_identity(config, scratch),
            "variant": variant,
            "train": common,
            "seed": config.seed,
        }
        for variant in config.train.drafters
    }
    return {
        name: open_artifact(Path(config.storage), f"drafter-{name}", given) for name, given in inputs.items()
    }, inputs


def train(
    config: Config,
    executor: Executor,
    prepare: Artifact,
    teach: Artifact,
    scratch: dict[str, Artifact],
    watch: Watch = unwatched,
) -> dict[str, Artifact]:
    """Train every variant; each is an artifact of its own, so adding one leaves the others alone."""
    artifacts, inputs = drafters(config, teach, scratch)
    models = drafter_ref(config, scratch), target_ref(config, scratch)
    job = TrainJob(config, {}, prepare.path, teach.path, *models)
    run_missing(executor, artifacts, inputs, job, watch)
    return artifacts


def drafter_ref(config: Config, scratch: dict[str, Artifact]) -> ModelRef:
    """The drafter that training starts from."""
    if isinstance(config.drafter, FirstLayers):
        return layers_ref(target_ref(config, scratch), config.drafter)
    if isinstance(config.drafter, Head):  # what it is made of
        return replace(target_ref(config, scratch), role="drafter")
    start = scratch.get("drafter")
    return model_ref(config.drafter, start.path / MODEL if start else None, "drafter", longest_text(config))


def target_ref(config: Config, scratch: dict[str, Artifact]) -> ModelRef:
    start = scratch.get("target")
    return model_ref(config.target, start.path / MODEL if start else None, "target", longest_text(config))


def drafter_identity(config: Config, scratch: dict[str, Artifact]) -> Any:
    """How a fingerprint identifies the drafter that training starts from."""
    if isinstance(config.drafter, FirstLayers):
        return {"layers": config.drafter, "of": model_identity(config.target, scratch.get("target"))}
    if isinstance(config.drafter, Head):
        return {"head": config.drafter, "of": model_identity(config.target, scratch.get("target"))}
    return model_identity(config.drafter, scratch.get("drafter"))


def model_identity(spec: AnyModel, scratch: Artifact | None) -> Any:
    """How a fingerprint identifies a model: by the artifact that made it; else by its config and, for a local
    folder, by the sizes and times of change of its files."""
    if scratch:
        return scratch.fingerprint
    assert isinstance(spec, PretrainedModel)
    return {"model": spec, "files": {name: list(stat) for name, stat in model_files(Path(spec.path)).items()}}


def model_bytes(shape: Shape, steps: int) -> int:
    """The most bytes on disk of a model that is trained for so many steps, by its parameters."""
    return 4 * (shape.frozen + shape.trained * (TRAINED_COPIES if steps else 1))


def run_missing(
    executor: Executor,
    artifacts: dict[str, Artifact],
    inputs: Mapping[str, dict[str, Any]],
    job: TrainJob,
    watch: Watch,
) -> None:
    """One launch of the workers for all models that are not complete, then their manifests."""
    with ExitStack() as claims:
        # Claimed in one order, so that two runs never wait for each other.
        missing = {
            name: artifacts[name]
            for name in sorted(artifacts)
            if claims.enter_context(artifacts[name].claim(whole=True))
        }
        if missing:
            launch(
                {name: missing[name] for name in artifacts if name in missing}, inputs, executor, job, watch
            )


def launch(
    missing: dict[str, Artifact],
    inputs: Mapping[str, dict[str, Any]],
    executor: Executor,
    job: TrainJob,
    watch: Watch,
) -> None:
    began = time.perf_counter()
    job = replace(job, outputs={name: artifact.path for name, artifact in missing.items()})
    with watch({name: folder / METRICS for name, folder in job.outputs.items()}):
        executor.train(run_job, job)
    seconds = time.perf_counter() - began
    for artifact in missing.values():
        if not (artifact.path / MODEL).exists():
            raise Incomplete(f"training ended without a model in {artifact.path}; its checkpoints are kept")
    for name, artifact in missing.items():
        # A config with more steps has another fingerprint, so nothing resumes from these checkpoints.
        shutil.rmtree(artifact.path / CHECKPOINTS, ignore_errors=True)
        artifact.finish(inputs[name], peak_memory(artifact.path), seconds)


def peak_memory(folder: Path) -> dict[str, Any]:
    """The entry about memory in a trained model's manifest; empty for a model that was not trained."""
    file = folder / MEMORY
    if not file.exists():
        return {}
    return {"peak_memory_bytes_by_rank": json.loads(file.read_text(encoding="utf-8"))["ranks"]}
