"""Training on Ray Train workers with DeepSpeed; what they tell the driver, and how it stops them."""

from __future__ import annotations

import json
import logging
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from threading import Thread
from typing import Any

from jobs.executors.base import stalled
from pipeline.errors import BadData, Incomplete, NotFinite, disk_trouble
from pipeline.store.files import write_json
from pipeline.store.layout import METRICS
from pipeline.train.job import Training, TrainJob, is_first_worker
from pipeline.train.stopping import Stopped

COMPLAINT = ".error-{}.json"  # file in which a training worker reports an error to the driver
STOP = ".stop-{}"  # file with which the driver asks the workers to stop
LOOK_S = 5.0  # how often a wait for training looks for new rows
STOP_WAIT_S = 60  # time that the workers then have to write a checkpoint
ERRORS: dict[str, type[Exception]] = {"BadData": BadData, "NotFinite": NotFinite}
DEVICES = ("none", "cpu", "nvme")  # that DeepSpeed offloads to
# ZeRO settings that are looked at here; importing DeepSpeed, which knows all of them, takes seconds.
CHECKED = {"stage", "offload_optimizer", "reduce_bucket_size", "stage3_max_live_parameters"}
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
            # Ray Train resumes by name from its storage; our checkpoints lie in the artifact itself, so Ray
            # Train's folder holds nothing but its bookkeeping.
            name=first.name,
            storage_path=str(first.parent.resolve() / ".ray_train"),
            failure_config=FailureConfig(max_failures=MAX_RETRIES),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    complaint, stop = complaint_of(job), stop_of(job)
    try:
        fit_or_stop(trainer, stop, job)
        if complaint.exists():
            reported = json.loads(complaint.read_text(encoding="utf-8"))
            raise ERRORS[reported["type"]](reported["text"])
    finally:
        complaint.unlink(missing_ok=True)
        stop.unlink(missing_ok=True)


def complaint_of(job: TrainJob) -> Path:
    return next(iter(job.outputs.values())) / COMPLAINT.format(job.launch)


def stop_of(job: TrainJob) -> Path:
    return next(iter(job.outputs.values())) / STOP.format(job.launch)


def fit_or_stop(trainer: Any, stop: Path, job: TrainJob) -> None:
    """Wait for training; on an interrupt, ask the workers for a checkpoint first, then raise it again.

    Ray Train runs in a thread of its own: in the main thread it would take Ctrl-C for itself, and Ray makes
    a plain KeyboardInterrupt of whatever a signal raises in there.

    Raises:
        OSError: if a worker's disk is full, or ails otherwise.
        Incomplete: if no row of a metrics file was written for `run.stall_minutes`.
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
    rows, since = 0, time.monotonic()
    try:
        while not wait([done], LOOK_S).done:
            if (grown := metrics_bytes(job)) != rows:
                rows, since = grown, time.monotonic()
            if time.monotonic() - since > 60 * job.config.run.stall_minutes:
                raise Incomplete(stalled(f"train {', '.join(job.outputs)}", job.config.run))
        done.result()
    except KeyboardInterrupt:
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
        wait([done], STOP_WAIT_S)
        raise
    except TrainingFailedError as error:
        trouble = disk_error(error)
        if trouble is None:
            raise
        raise trouble from error


def metrics_bytes(job: TrainJob) -> int:
    """Sizes of the metrics files that are written, in all."""
    files = [folder / METRICS for folder in job.outputs.values()]
    return sum(file.stat().st_size for file in files if file.exists())


def disk_error(error: Exception) -> OSError | None:
    """What ails the disk behind a failed launch, in one of its workers or in Ray Train's own files."""
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)  # Ray Train may have wrapped it
        if isinstance(cause, OSError) and disk_trouble(cause):
            return cause
    return None


def train_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: the training job over a DeepSpeed engine.

    Ray Train starts the group again after any exception. That helps after a lost machine, not after bad data
    or a diverged loss: these errors are written down for the driver, which raises them. If only one rank may
    have met the error, it also ends the group, whose other ranks would wait for it; the group that Ray Train
    then starts again finds the error and leaves at once.
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
    except NotFinite as error:  # losses are averaged over all ranks, so that every rank gets here
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

    Settings beyond those that the shipped files have are shown to DeepSpeed itself.

    Raises:
        BadData: if it is missing, no JSON object, has ZeRO settings that DeepSpeed does not take, or sets the
            precision, which results depend on. The text names the file and the field.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadData(f"train.deepspeed: cannot read {path!r}: {error}") from error
    if not isinstance(settings, dict):
        raise BadData(f"train.deepspeed: {path!r} must hold a JSON object")
    for field in ("fp16", "bf16", "amp"):
        if field in settings:
            raise BadData(f"{path}: {field!r} is not for this file; precision is train.dtype in the config")
    zero = settings.get("zero_optimization", {})
    _check(path, "zero_optimization", zero, isinstance(zero, dict), 'an object, such as {"stage": 1}')
    offload = zero.get("offload_optimizer", {})
    _check(path, "zero_optimization.offload_optimizer", offload, isinstance(offload, dict), "an object")
    device = offload.get("device", "none")
    _check(path, "zero_optimization.offload_optimizer.device", device, device in DEVICES, f"one of {DEVICES}")
    stage = zero.get("stage", 0)
    _check(path, "zero_optimization.stage", stage, type(stage) is int and 0 <= stage <= 3, "0, 1, 2 or 3")
    for name in ("reduce_bucket_size", "stage3_max_live_parameters"):
        size = zero.get(name, 1)
        _check(
            path,
            f"zero_optimization.{name}",
            size,
            type(size) in (int, float) and 1 <= size <= 1e15,
            "a number",
        )
    for name in settings:  # DeepSpeed passes over what it does not know, and would train without ZeRO
        if name != "zero_optimization" and get_close_matches(name, ["zero_optimization"]):
            raise BadData(f"train.deepspeed: {path}: there is no {name!r}; did you mean zero_optimization?")
    if zero.keys() - CHECKED or offload.keys() - {"device"}:
        from jobs.executors.deepspeed_engine import problem_of_zero

        if problem := problem_of_zero(zero):
            raise BadData(f"train.deepspeed: {path}: zero_optimization.{problem}")
    return settings


def _check(path: str, field: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise BadData(f"train.deepspeed: {path}: {field} is {json.dumps(value)[:60]}; it must be {expected}")
