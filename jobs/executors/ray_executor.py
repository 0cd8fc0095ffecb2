"""Ray tasks and actors; their pools are in `ray_pool.py`, training in `ray_train.py`.

Retries are counted here rather than left to Ray: a worker that dies (killed, out of memory, its node gone)
gives its item back. An item is tried `MAX_ATTEMPTS` times in all, on a new worker if there is room for one.
An exception that the work itself raises is not tried again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cached_property
from types import ModuleType
from typing import Any

from jobs.executors.base import Batch, Executor, Item, Result, stalled
from jobs.executors.ray_address import LOCAL, address_of, start_ray
from jobs.executors.ray_cluster import check_nodes, count_fitting, request
from jobs.executors.ray_pool import Pool, Tasks, Worker
from jobs.executors.ray_train import train_on_ray
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.errors import BadData, Incomplete
from pipeline.observe import logs
from pipeline.observe.events import listening
from pipeline.observe.progress import progress
from pipeline.train.job import Training, TrainJob

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
MAX_LOSSES = 9  # workers that may die before the first item is done; more is no accident
LOOK_S = 5.0  # how often a stage looks around while nothing happens
# How many tasks wait in Ray for each that can run. More would cost the driver memory and time to watch.
WAITING_PER_SLOT = 3
# How long a stage waits for a machine to come back when the cluster has none left that could do its work.
ROOM_WAIT_S = 60.0


class RayExecutor(Executor):
    """Ray tasks, actors, and Ray Train workers with DeepSpeed. Ray starts with the first request for work."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.contexts = ExitStack()

    @cached_property
    def ray(self) -> ModuleType:
        run = self.config.run
        threads = str(max(1, int(run.cpus_per_task)))
        ray = start_ray(
            run,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, **record_folder()}},
        )
        from jobs.executors.ray_metrics import RayMetrics

        self.contexts.enter_context(listening(RayMetrics()))
        if address_of(run) != LOCAL:
            check_nodes(ray)
        return ray

    def run(self, batch: Batch[Item, Result]) -> Iterator[tuple[Item, Result]]:
        if not batch.items:
            return
        if batch.num_workers is None:
            yield from self._drive(self._tasks(batch), batch)
            return
        self.room(batch.work)
        # An actor whose process died is replaced by a new one.
        options = {"max_restarts": 0, "max_task_retries": 0, **request(self.config.run, batch.work)}
        actor = self.ray.remote(**options)(Worker)
        most = min(batch.num_workers, len(batch.items))
        pool = Pool(self.ray, lambda: actor.remote(batch.factory), most, self.fitting(batch.work))
        try:
            yield from self._drive(pool, batch)
        finally:
            pool.release(everyone=True)

    def _tasks(self, batch: Batch[Item, Result]) -> Tasks:
        function = batch.factory()

        def call(item: Item, work_item: logs.WorkItem) -> Result:  # Ray takes no partial functions
            with logs.item(work_item):
                return function(item)

        task = self.ray.remote(max_retries=0, **request(self.config.run, batch.work))(call)
        return Tasks(task, WAITING_PER_SLOT * self.room(batch.work), self.fitting(batch.work))

    def _drive(self, pool: Tasks | Pool, batch: Batch[Item, Result]) -> Iterator[tuple[Item, Result]]:
        """Keep the pool busy until every item has a result or was given up."""
        items, description = batch.items, batch.description
        ray = self.ray
        errors = ray.exceptions
        # Without the errors of a broken environment or a full object store, which would meet every item.
        lost = (
            errors.WorkerCrashedError,
            errors.RayActorError,
            errors.NodeDiedError,
            errors.LocalRayletDiedError,
            errors.OutOfMemoryError,
        )
        queue = deque((item, 1) for item in items)
        busy: dict[Any, tuple[Any, Item, int]] = {}
        given_up: list[str] = []
        succeeded, losses, since = 0, 0, time.monotonic()
        ended = since  # the last time that an item came back, or that there was none to wait for
        with progress(len(items), description) as bar:
            while queue or busy:
                while queue and (worker := pool.take(len(queue))) is not None:
                    item, attempt = queue.popleft()
                    work_item = logs.WorkItem(logs.here().stage, logs.name_of(item), attempt)
                    busy[worker.remote(item, work_item)] = (worker, item, attempt)
                if not queue:
                    pool.release()
                if not busy:  # workers wait for room on machines that others use
                    ended = time.monotonic()
                waiting = [*busy, *pool.starting]
                done, _ = ray.wait(waiting, num_returns=1, timeout=LOOK_S) if waiting else ([], [])
                if not done:
                    if time.monotonic() - ended > 60 * self.config.run.stall_minutes:
                        items_left = [item for _, item, _ in busy.values()]
                        raise Incomplete(stalled(description, self.config.run, items_left))
                    since = self._wait_for_room(pool, since, description, len(queue) + len(busy))
                    continue
                since = time.monotonic()
                if done[0] in pool.starting:
                    pool.started(done[0])
                    continue
                worker, item, attempt = busy.pop(done[0])
                ended = since
                name = logs.name_of(item)
                try:
                    result = ray.get(done[0])
                except errors.RayTaskError as error:
                    # The exception of the work itself, rather than Ray's wrapping of it.
                    cause = error.cause if isinstance(error.cause, BaseException) else error
                    raise cause from error
                except lost as error:
                    pool.drop(worker)
                    why = first_line(error)
                    losses += 1
                    if not succeeded and losses >= MAX_LOSSES:
                        raise Incomplete(
                            f"{description}: {losses} workers died and none has done anything yet: {why}"
                        ) from error
                    if attempt < MAX_ATTEMPTS:
                        log.warning("%s: attempt %d of %s lost: %s", description, attempt, name, why)
                        queue.append((item, attempt + 1))
                        bar.retried()
                        continue
                    log.error("%s: %s given up after %d attempts: %s", description, name, attempt, why)
                    bar.failed()
                    if batch.on_lost is None:
                        given_up.append(f"{name}: {why}")
                        continue
                    result = batch.on_lost(item, why)
                else:
                    pool.give(worker)
                    succeeded += 1
                yield item, result
                bar.update(1)
        if given_up:
            raise Incomplete(
                f"{description}: {len(given_up)} of {len(items)} killed their worker {MAX_ATTEMPTS} times, "
                f"the first: {given_up[0]}; if memory ran out, ask for more with "
                "run.resources.*.memory_gb or take smaller batches"
            )

    def _wait_for_room(self, pool: Tasks | Pool, since: float, description: str, left: int) -> float:
        """Pause while nothing happens; returns the time since which no machine could do the work.

        Raises:
            Incomplete: if that has lasted too long. Machines that are busy may take as long as they like.
        """
        if pool.fitting() > 0:
            time.sleep(0 if pool.starting else 1.0)
            return time.monotonic()
        if time.monotonic() - since > ROOM_WAIT_S:
            raise Incomplete(
                f"{description}: no machine of the cluster is left that could do it; {left} are not done"
            )
        time.sleep(1.0)
        return since

    def fitting(self, work: Work) -> Callable[[], int]:
        return lambda: count_fitting(self.ray, self.config.run, work)

    def room(self, work: Work) -> int:
        """How many workers of a kind the cluster has room for now.

        Raises:
            BadData: if not even one fits any machine; the text names the fields.
        """
        return count_fitting(self.ray, self.config.run, work, at_least=1)

    def launch(self, function: Training, job: TrainJob) -> None:
        room, wanted = self.room("train"), self.config.train.num_workers
        if wanted > room:
            raise BadData(f"train.num_workers = {wanted}, but the cluster has room for {room}")
        train_on_ray(function, job)

    def close(self) -> None:
        self.contexts.close()
        if "ray" in self.__dict__:
            self.ray.shutdown()


def record_folder() -> dict[str, str]:
    """Where workers write their logs, for their environment."""
    folder = os.environ.get(logs.RECORD)
    return {logs.RECORD: folder} if folder else {}


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
