"""The workers for items on Ray: a task that is called again and again, or a pool of actors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any

from pipeline.observe import logs

log = logging.getLogger(__name__)


class Tasks:
    """A remote function, handed out for as many calls as may wait at once."""

    starting: dict[Any, Any]

    def __init__(self, task: Any, most: int, fitting: Callable[[], int]) -> None:
        self.task, self.free, self.fitting, self.starting = task, most, fitting, {}

    def take(self, wanted: int) -> Any:
        if self.free == 0:
            return None
        self.free -= 1
        return self.task

    def give(self, worker: Any) -> None:
        self.free += 1

    drop = give

    def started(self, reference: Any) -> None:
        raise AssertionError("tasks have nothing to start")

    def release(self) -> None:
        return None


class Pool:
    """At most `most` actors. Items go only to actors that run already: an actor that waits for room in the
    cluster would keep its item while the rest of the pool is idle."""

    def __init__(
        self, ray: ModuleType, make: Callable[[], Any], most: int, fitting: Callable[[], int]
    ) -> None:
        self.ray, self.make, self.most, self.fitting = ray, make, most, fitting
        self.starting: dict[Any, Any] = {}  # reference that resolves when it runs → actor
        self.idle: list[Any] = []  # methods, which `take` hands out
        self.alive: dict[Any, Any] = {}  # method → actor

    def take(self, wanted: int) -> Any:
        """An idle actor's method; else None, after starting as many actors as there are items and room."""
        if self.idle:
            return self.idle.pop()
        missing = min(self.most - len(self.alive), wanted) - len(self.starting)
        if missing > 0:
            room = self.fitting() - len(self.alive) - len(self.starting)
            for _ in range(min(missing, room)):
                actor = self.make()
                self.starting[actor.ready.remote()] = actor
        return None

    def started(self, reference: Any) -> None:
        """An actor that was started now runs, or has died; `take` then starts another when it is called."""
        actor = self.starting.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayActorError as error:
            log.warning("a worker died while it started: %s", str(error).strip().splitlines()[0])
            return
        call = actor.call  # a key: each access to `actor.call` makes another object
        self.alive[call] = actor
        self.idle.append(call)

    def give(self, worker: Any) -> None:
        self.idle.append(worker)

    def drop(self, worker: Any) -> None:
        self.ray.kill(self.alive.pop(worker))

    def release(self, everyone: bool = False) -> None:
        """Kill actors that have nothing to do, or `everyone`: others may wait for their room."""
        for actor in self.starting.values():
            self.ray.kill(actor)
        self.starting = {}
        for worker in list(self.alive) if everyone else self.idle:
            self.ray.kill(self.alive.pop(worker))
        self.idle = []


class Worker:
    """A Ray actor around the function that the factory makes.

    The function is made in the first call, not with the actor: an actor that cannot be made is reported as
    dead, and the factory's own exception is lost.
    """

    def __init__(self, factory: Callable[[], Callable[[Any], Any]]) -> None:
        self.factory = factory

    def ready(self) -> None:
        """Returns once the actor runs."""

    @cached_property
    def function(self) -> Callable[[Any], Any]:
        return self.factory()

    def call(self, item: Any, work_item: logs.WorkItem) -> Any:
        with logs.item(work_item):
            return self.function(item)
