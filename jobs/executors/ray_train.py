"""Training on Ray Train workers with DeepSpeed; what they tell the driver, and how it stops them."""

from __future__ import annotations

import errno
import json
import logging
import uuid
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

from pipeline.errors import BadData, NotFinite
from pipeline.store.files import write_json
from pipeline.train.job import Training, TrainJob, is_first_worker
from pipeline.train.stopping import Stopped

COMPLAINT = ".error-{}.json"  # what a training worker leaves for the driver of the launch
STOP = ".stop-{}"  # what the driver leaves for the workers
STOP_WAIT_S = 60  # that they have to write a checkpoint
ERRORS: dict[str, type[Exception]] = {"BadData": BadData, "NotFinite": NotFinite}
MAX_RETRIES = 2  # of the training group, after a worker died

log = logging.getLogger(__name__)


def train_on_ray(function: Training, job: TrainJob) -> None:
    """Call `function` in each of `train.num_workers` workers and wait for them. Ray must run already."""
    job = replace(job, deepspeed=read_settings(job.config.train.deepspeed), launch=uuid.uuid4().hex[:8])
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    train, needs = job.config.train, job.config.run.needs("train")
    gpu = bool(needs.gpus)
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": int((needs.memory_gb or 0) * 1e9)}
    first = next(iter(job.outputs.values()))
    environment = {"OMP_NUM_THREADS": str(needs.threads)}
    if not gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"function": function, "job": job},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=gpu,
            resources_per_worker={name: amount for name, amount in wanted.items() if amount},
        ),
        run_config=RunConfig(
            # Ray Train resumes by name from its storage; our checkpoints lie in the artifact itself, so
            # its own folder holds nothing but its bookkeeping.
            name=first.name,
            storage_path=str(first.parent.resolve() / ".ray_train"),
            failure_config=FailureConfig(max_failures=MAX_RETRIES),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    complaint, stop = complaint_of(job), stop_of(job)
    try:
        fit_or_stop(trainer, stop)
        if complaint.exists():
            told = json.loads(complaint.read_text(encoding="utf-8"))
            raise ERRORS[told["type"]](told["text"])
    finally:
        complaint.unlink(missing_ok=True)
        stop.unlink(missing_ok=True)


def complaint_of(job: TrainJob) -> Path:
    return next(iter(job.outputs.values())) / COMPLAINT.format(job.launch)


def stop_of(job: TrainJob) -> Path:
    return next(iter(job.outputs.values())) / STOP.format(job.launch)


def fit_or_stop(trainer: Any, stop: Path) -> None:
    """Wait for training; an interrupt first asks the workers for a checkpoint, then goes on.

    Ray Train runs in a thread of its own: in the main thread it would take Ctrl-C for itself, and Ray makes
    a plain KeyboardInterrupt of whatever a signal raises in there.

    Raises:
        OSError: if a worker's disk is full.
    """
    from ray.train import TrainingFailedError

    done: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    Thread(target=fit, daemon=True, name="ray-train").start()
    try:
        done.result()
    except KeyboardInterrupt:
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
        wait([done], STOP_WAIT_S)
        raise
    except TrainingFailedError as error:
        full = full_disk(error)
        if full is None:
            raise
        raise full from error


def full_disk(error: Exception) -> OSError | None:
    """The full disk behind a failed launch, in one of its workers or in Ray Train's own files."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        told = getattr(failure, "_base_exc", failure)  # Ray Train's wrapping of it
        if isinstance(told, OSError) and told.errno in (errno.ENOSPC, errno.EDQUOT):
            return told
    return None


def train_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: the training job over a DeepSpeed engine.

    Ray Train starts the group again after any exception. That helps after a lost machine, not after bad data
    or a diverged loss: those are written down for the driver, which raises them. Where one rank alone meets
    them, it ends the group, whose other ranks would wait for it; the group that is started again leaves at
    once.
    """
    from jobs.executors.deepspeed_engine import deepspeed_engine

    function: Training = settings["function"]
    job: TrainJob = settings["job"]
    complaint, stop = complaint_of(job), stop_of(job)
    if complaint.exists():
        return
    try:
        function(job, deepspeed_engine(job.config, job.deepspeed), stop.exists)
    except Stopped as stopped:
        log.info("%s", stopped)
    except NotFinite as error:  # found in losses that are averaged over all ranks: all are here
        if is_first_worker():
            complain(complaint, error)
    except BadData as error:
        complain(complaint, error)
        if job.config.train.num_workers > 1:
            raise


def complain(complaint: Path, error: Exception) -> None:
    write_json(complaint, {"type": type(error).__name__, "text": str(error)})


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
