"""The only file that knows whether work runs on Ray or in this process.

Both executors have the same three verbs: `map` (stateless tasks), `map_actors` (workers that keep models
loaded between items) and `train` (a group of data-parallel training workers). Only metadata travels through
them; tensors stay in files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol, TypeVar

from jobs import raise_on_sigterm
from pipeline.artifacts import write_json
from pipeline.config import Config
from pipeline.decoding import NotFinite
from pipeline.engine import TorchEngine
from pipeline.errors import BadData
from pipeline.progress import progress
from pipeline.train_job import TrainJob, is_first_worker, run_job

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

COMPLAINT = ".error.json"  # what a training worker leaves for the driver
ERRORS: dict[str, type[Exception]] = {"BadData": BadData, "NotFinite": NotFinite}
MAX_RETRIES = 2  # of a task, an actor call or the training group, after a worker died


class Executor(Protocol):
    """What a stage may ask of whoever runs it. `calls` counts what was asked: a cached stage asks nothing."""

    calls: int

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], description: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run `function` on every item as independent tasks; yields pairs as they finish, with progress.

        An exception in a task is raised here. `function` and items must pickle.
        """
        ...

    def map_actors(
        self,
        factory: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        description: str,
        num_actors: int,
    ) -> Iterator[tuple[Item, Result]]:
        """Like `map`, over `num_actors` workers that each call `factory` once and keep what it returns."""
        ...

    def train(self, job: TrainJob) -> None:
        """Run a training job on `train.num_workers` workers and wait for it."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...


def make_executor(config: Config) -> Executor:
    return RayExecutor(config) if config.run.executor == "ray" else InlineExecutor(config)


class InlineExecutor:
    """Everything in this process, one thing after another; training with the plain torch engine."""

    def __init__(self, config: Config) -> None:
        self.config, self.calls = config, 0

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], description: str
    ) -> Iterator[tuple[Item, Result]]:
        self.calls += 1
        with progress(len(items), description) as bar:
            for item in items:
                yield item, function(item)
                bar.update(1)

    def map_actors(
        self,
        factory: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        description: str,
        num_actors: int,
    ) -> Iterator[tuple[Item, Result]]:
        return self.map(factory(), items, description)

    def train(self, job: TrainJob) -> None:
        self.calls += 1
        train = job.config.train
        run_job(
            job,
            lambda model, plan: TorchEngine(
                model,
                device=job.device,
                weight_decay=plan.weight_decay,
                clip=plan.clip,
                accumulation=plan.micro_batches,
                bfloat16=train.dtype == "bfloat16",
            ),
        )

    def close(self) -> None:
        return None


class NoExecutor:
    """For reading what is complete: whoever asks it for work is told to run the pipeline first."""

    calls = 0

    def _refuse(self, what: str) -> NoReturn:
        raise BadData(f"{what} is not done for this config; run `budgetdraft run CONFIG` first")

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], description: str
    ) -> Iterator[tuple[Item, Result]]:
        self._refuse(description)

    def map_actors(
        self,
        factory: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        description: str,
        num_actors: int,
    ) -> Iterator[tuple[Item, Result]]:
        self._refuse(description)

    def train(self, job: TrainJob) -> None:
        self._refuse(f"training of {', '.join(job.outputs)}")

    def close(self) -> None:
        return None


class RayExecutor:
    """Ray tasks, actors, and Ray Train workers with DeepSpeed. Ray starts with the first thing to do."""

    def __init__(self, config: Config) -> None:
        self.config, self.calls = config, 0

    @cached_property
    def ray(self) -> ModuleType:
        import ray

        address = self.config.run.ray_address
        if address is None and "RAY_JOB_ID" not in os.environ and "RAY_ADDRESS" not in os.environ:
            address = "local"
        threads = str(max(1, int(self.config.run.cpus_per_task)))
        ray.init(
            address=address,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        raise_on_sigterm()  # Ray's own handler has replaced ours
        return ray

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], description: str
    ) -> Iterator[tuple[Item, Result]]:
        self.calls += 1

        def call(item: Item) -> Result:  # Ray takes no partial functions
            return function(item)

        # Only data is prepared in plain tasks; they need no GPU.
        task = self.ray.remote(max_retries=MAX_RETRIES, num_cpus=self.config.run.cpus_per_task)(call)
        waiting = {task.remote(item): item for item in items}
        with progress(len(items), description) as bar:
            while waiting:
                (done,), _ = self.ray.wait(list(waiting), num_returns=1)
                yield waiting.pop(done), self.result(done)
                bar.update(1)

    def map_actors(
        self,
        factory: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        description: str,
        num_actors: int,
    ) -> Iterator[tuple[Item, Result]]:
        self.calls += 1
        run = self.config.run
        actor = self.ray.remote(
            max_restarts=MAX_RETRIES,
            max_task_retries=MAX_RETRIES,
            num_cpus=run.cpus_per_task,
            num_gpus=run.gpus_per_task,
        )(_Worker)
        # An actor for which there is no room would keep its item for ever.
        fitting = min(num_actors, len(items), self.most_workers())
        actors = [actor.remote(factory) for _ in range(fitting)]
        try:
            busy = {
                worker.call.remote(item): (worker, item) for worker, item in zip(actors, items, strict=False)
            }
            rest = iter(items[len(actors) :])
            with progress(len(items), description) as bar:
                while busy:
                    (done,), _ = self.ray.wait(list(busy), num_returns=1)
                    worker, item = busy.pop(done)
                    result = self.result(done)
                    for following in rest:
                        busy[worker.call.remote(following)] = (worker, following)
                        break
                    yield item, result
                    bar.update(1)
        finally:
            for worker in actors:
                self.ray.kill(worker)

    def most_workers(self) -> int:
        """How many workers the cluster has room for.

        Raises:
            BadData: if not even one fits.
        """
        have, run = self.ray.cluster_resources(), self.config.run
        wanted = {"CPU": run.cpus_per_task, "GPU": run.gpus_per_task}
        room = [int(have.get(name, 0) // amount) for name, amount in wanted.items() if amount]
        if room and min(room) < 1:
            raise BadData(
                f"run.cpus_per_task = {run.cpus_per_task:g} and run.gpus_per_task = {run.gpus_per_task:g} "
                f"do not fit the cluster: {have.get('CPU', 0):g} CPUs, {have.get('GPU', 0):g} GPUs"
            )
        return min(room, default=1_000_000)

    def result(self, reference: Any) -> Any:
        """The value of a finished task; its own exception rather than Ray's wrapping of it."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, BaseException) else error
            raise cause from error

    def train(self, job: TrainJob) -> None:
        self.calls += 1
        job = replace(job, deepspeed=read_settings(job.config.train.deepspeed))
        self.ray  # noqa: B018  Ray must run before Ray Train looks for it
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        run, train = self.config.run, self.config.train
        gpu = run.gpus_per_task > 0
        resources = {"CPU": run.cpus_per_task, **({"GPU": run.gpus_per_task} if gpu else {})}
        if train.num_workers > self.most_workers():
            raise BadData(
                f"train.num_workers = {train.num_workers}, but the cluster has room for {self.most_workers()}"
            )
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

    def close(self) -> None:
        if "ray" in self.__dict__:
            self.ray.shutdown()


class _Worker:
    """A Ray actor around what the factory makes.

    It is made in the first call, not with the actor: an actor that cannot be made is reported as dead, and
    the factory's own exception is lost.
    """

    def __init__(self, factory: Callable[[], Callable[[Any], Any]]) -> None:
        self.factory = factory

    @cached_property
    def function(self) -> Callable[[Any], Any]:
        return self.factory()

    def call(self, item: Any) -> Any:
        return self.function(item)


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
