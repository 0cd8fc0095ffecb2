"""Training on Ray Train workers with DeepSpeed, and what they tell the driver."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.decoding import NotFinite
from pipeline.errors import BadData
from pipeline.train_job import TrainJob, is_first_worker, run_job

COMPLAINT = ".error.json"  # what a training worker leaves for the driver
ERRORS: dict[str, type[Exception]] = {"BadData": BadData, "NotFinite": NotFinite}
MAX_RETRIES = 2  # of the training group, after a worker died


def train_on_ray(job: TrainJob) -> None:
    """Run a training job on `train.num_workers` workers and wait for it. Ray must run already."""
    job = replace(job, deepspeed=read_settings(job.config.train.deepspeed))
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    run, train = job.config.run, job.config.train
    gpu = run.gpus_per_task > 0
    resources = {"CPU": run.cpus_per_task, **({"GPU": run.gpus_per_task} if gpu else {})}
    first = next(iter(job.outputs.values()))
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            # Ray Train resumes by name from its storage; our checkpoints lie in the artifact itself, so
            # its own folder holds nothing but its bookkeeping.
            name=first.name,
            storage_path=str(first.parent.resolve() / ".ray_train"),
            failure_config=FailureConfig(max_failures=MAX_RETRIES),
            worker_runtime_env={"env_vars": {} if gpu else {"DS_ACCELERATOR": "cpu"}},
        ),
    )
    complaint = first / COMPLAINT
    complaint.unlink(missing_ok=True)
    trainer.fit()
    if complaint.exists():
        told = json.loads(complaint.read_text(encoding="utf-8"))
        raise ERRORS[told["type"]](told["text"])


def train_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: the training job over a DeepSpeed engine.

    Ray Train starts the group again after any exception. That helps after a lost machine, not after bad data
    or a diverged loss, which all ranks meet alike: those are written down, and the driver raises them.
    """
    from jobs.deepspeed_engine import deepspeed_engine

    job: TrainJob = settings["job"]
    try:
        run_job(job, deepspeed_engine(job.config, job.deepspeed))
    except tuple(ERRORS.values()) as error:
        if is_first_worker():
            told = {"type": type(error).__name__, "text": str(error)}
            write_json(next(iter(job.outputs.values())) / COMPLAINT, told)


def read_settings(path: str) -> dict[str, Any]:
    """A DeepSpeed settings file.

    Raises:
        BadData: if it is missing, not JSON, or sets the precision, which results depend on.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadData(f"train.deepspeed: cannot read {path!r}: {error}") from error
    for field in ("fp16", "bf16", "amp"):
        if field in settings:
            raise BadData(f"{path}: {field!r} is not for this file; precision is train.dtype in the config")
    return settings
