"""Ray tasks and actors; training is in `ray_train.py`, what fits where in `ray_cluster.py`.

Retries are counted here rather than left to Ray: a worker that dies (killed, out of memory, its node gone)
gives its item back, which is tried `MAX_ATTEMPTS` times in all, on a new worker where there is room for one.
An exception that the work itself raises is not tried again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import ModuleType
from typing import Any

from jobs import raise_on_sigterm
from jobs.executor import Item, Result
from jobs.ray_cluster import check_nodes, count_fitting, request
from jobs.ray_train import train_on_ray
from pipeline import logs
from pipeline.config import Config, Work
from pipeline.errors import BadData, Incomplete
from pipeline.events import listening
from pipeline.progress import progress
from pipeline.train_job import TrainJob

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# How many tasks wait in Ray for each that can run. More would cost the driver memory and time to watch.
WAITING_PER_SLOT = 3
# How long a stage waits for a machine to come back when none of the cluster is left that could do its work.
ROOM_WAIT_S = 60.0


class RayExecutor:
    """Ray tasks, actors, and Ray Train workers with DeepSpeed. Ray starts with the first thing to do."""

    def __init__(self, config: Config) -> None:
        self.config, self.calls = config, 0
        self.contexts = ExitStack()

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
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, **record_folder()}},
        )
        raise_on_sigterm()  # Ray's own handler has replaced ours
        from jobs.ray_metrics import RayMetrics

        self.contexts.enter_context(listening(RayMetrics()))
        if address != "local":
            check_nodes(ray)
        return ray

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], description: str
    ) -> Iterator[tuple[Item, Result]]:
        def call(item: Item, place: logs.Place) -> Result:  # Ray takes no partial functions
            with logs.item(place):
                return function(item)

        self.calls += 1
        if not items:
            return
        task = self.ray.remote(max_retries=0, **request(self.config.run, "prepare"))(call)
        most = WAITING_PER_SLOT * self.room("prepare")
        yield from self._drive(_Tasks(task, most), items, description, None)

    def map_actors(
        self,
        factory: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        description: str,
        num_actors: int,
        work: Work,
        on_lost: Callable[[Item, str], Result] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        self.calls += 1
        if not items:
            return
        run = self.config.run
        # An actor whose process died is replaced by a new one, which is made for the next item.
        actor = self.ray.remote(max_restarts=0, max_task_retries=0, **request(run, work))(_Worker)
        self.room(work)
        pool = _Pool(
            self.ray,
            lambda: actor.remote(factory),
            min(num_actors, len(items)),
            lambda: count_fitting(self.ray, run, work),
        )
        try:
            yield from self._drive(pool, items, description, on_lost)
        finally:
            pool.close()

    def _drive(
        self,
        pool: _Tasks | _Pool,
        items: Sequence[Item],
        description: str,
        on_lost: Callable[[Item, str], Result] | None,
    ) -> Iterator[tuple[Item, Result]]:
        """Keep the pool busy until every item has a result or was given up."""
        ray = self.ray
        queue = deque((item, 1) for item in items)
        busy: dict[Any, tuple[Any, Item, int]] = {}
        given_up: list[str] = []
        since = time.monotonic()
        with progress(len(items), description) as bar:
            while queue or busy:
                while queue and (worker := pool.take()) is not None:
                    item, attempt = queue.popleft()
                    place = logs.Place(logs.here().stage, logs.name_of(item), attempt)
                    busy[worker.remote(item, place)] = (worker, item, attempt)
                if not busy:
                    if time.monotonic() - since > ROOM_WAIT_S:
                        raise Incomplete(
                            f"{description}: no machine of the cluster is left that could do it; "
                            f"{len(queue)} of {len(items)} are not done"
                        )
                    time.sleep(1.0)
                    continue
                (done,), _ = ray.wait(list(busy), num_returns=1)
                worker, item, attempt = busy.pop(done)
                since = time.monotonic()
                try:
                    result = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    # The exception of the work itself, rather than Ray's wrapping of it.
                    cause = error.cause if isinstance(error.cause, BaseException) else error
                    raise cause from error
                except ray.exceptions.RayError as error:
                    pool.drop(worker)
                    name, why = logs.name_of(item), first_line(error)
                    if attempt < MAX_ATTEMPTS:
                        log.warning("%s: attempt %d of %s lost: %s", description, attempt, name, why)
                        queue.append((item, attempt + 1))
                        bar.retried()
                        continue
                    log.error("%s: %s given up after %d attempts: %s", description, name, attempt, why)
                    bar.failed()
                    if on_lost is None:
                        given_up.append(f"{name}: {why}")
                        continue
                    result = on_lost(item, why)
                else:
                    pool.give(worker)
                yield item, result
                bar.update(1)
        if given_up:
            raise Incomplete(
                f"{description}: {len(given_up)} of {len(items)} killed their worker {MAX_ATTEMPTS} times, "
                f"the first: {given_up[0]}; if memory ran out, ask for more with "
                "run.resources.*.memory_gb or take smaller batches"
            )

    def room(self, work: Work) -> int:
        """How many workers of a kind the cluster has room for now.

        Raises:
            BadData: if not even one fits any machine; the text names the fields.
        """
        return count_fitting(self.ray, self.config.run, work, at_least=1)

    def train(self, job: TrainJob) -> None:
        self.calls += 1
        room, wanted = self.room("train"), self.config.train.num_workers
        if wanted > room:
            raise BadData(f"train.num_workers = {wanted}, but the cluster has room for {room}")
        train_on_ray(job)

    def close(self) -> None:
        self.contexts.close()
        if "ray" in self.__dict__:
            self.ray.shutdown()


class _Tasks:
    """A remote function, handed out for as many calls as may wait at once."""

    def __init__(self, task: Any, most: int) -> None:
        self.task, self.free = task, most

    def take(self) -> Any:
        if self.free == 0:
            return None
        self.free -= 1
        return self.task

    def give(self, worker: Any) -> None:
        self.free += 1

    drop = give


class _Pool:
    """At most `most` actors, made when there is an item for them and room in the cluster."""

    def __init__(
        self, ray: ModuleType, make: Callable[[], Any], most: int, fitting: Callable[[], int]
    ) -> None:
        self.ray, self.make, self.most, self.fitting = ray, make, most, fitting
        self.idle: list[Any] = []
        self.alive: dict[Any, Any] = {}  # an actor's method, which `take` hands out → the actor

    def take(self) -> Any:
        if self.idle:
            return self.idle.pop()
        # One for which there is no room would keep its item for ever.
        if len(self.alive) >= self.most or len(self.alive) >= self.fitting():
            return None
        actor = self.make()
        call = actor.call  # asked for again, it is another object
        self.alive[call] = actor
        return call

    def give(self, worker: Any) -> None:
        self.idle.append(worker)

    def drop(self, worker: Any) -> None:
        self.ray.kill(self.alive.pop(worker))

    def close(self) -> None:
        for actor in self.alive.values():
            self.ray.kill(actor)


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

    def call(self, item: Any, place: logs.Place) -> Any:
        with logs.item(place):
            return self.function(item)


def record_folder() -> dict[str, str]:
    """Where workers write their logs, for their environment."""
    folder = os.environ.get(logs.RECORD)
    return {logs.RECORD: folder} if folder else {}


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
