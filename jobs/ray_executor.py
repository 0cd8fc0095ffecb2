"""Ray tasks and actors; training is in `ray_train.py`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

from jobs import raise_on_sigterm
from jobs.executor import Item, Result
from jobs.ray_train import train_on_ray
from pipeline.config import Config
from pipeline.errors import BadData
from pipeline.progress import progress
from pipeline.train_job import TrainJob

MAX_RETRIES = 2  # of a task or an actor call, after a worker died


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
        self.ray  # noqa: B018  Ray must run before Ray Train looks for it
        if self.config.train.num_workers > self.most_workers():
            raise BadData(
                f"train.num_workers = {self.config.train.num_workers}, but the cluster has room for "
                f"{self.most_workers()}"
            )
        train_on_ray(job)

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
