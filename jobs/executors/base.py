"""Where work runs: in this process, or on Ray (`ray_executor.py`).

Executors have the same three verbs: `map` (stateless tasks), `map_actors` (workers that keep models loaded
between items) and `train` (a group of data-parallel training workers). Only metadata travels through them;
tensors stay in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from pipeline.config.run import Work
from pipeline.train.job import TrainJob

Item = TypeVar("Item")
Result = TypeVar("Result")


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
        work: Work,
        on_lost: Callable[[Item, str], Result] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        """Like `map`, over `num_actors` workers that each call `factory` once and keep what it returns.

        Args:
            work: says what a worker asks of the cluster, by `run.resources`.
            on_lost: what an item gives that killed its worker every time it was tried; takes the item and
                why. Without it that is `Incomplete`, once all others are done.
        """
        ...

    def train(self, job: TrainJob) -> None:
        """Run a training job on `train.num_workers` workers and wait for it."""
        ...

    def close(self) -> None:
        """Stop what was started."""
        ...
