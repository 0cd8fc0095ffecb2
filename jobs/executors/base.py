"""What a stage may ask of an executor, which is this process (`inline.py`) or Ray (`ray_executor.py`).

There are three verbs: `map` (stateless tasks), `map_actors` (workers that keep models loaded between items)
and `train` (a group of data-parallel training workers). Only metadata travels through them; tensors stay in
files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipeline.config.run import Run, Work
from pipeline.observe import logs
from pipeline.train.job import Training, TrainJob

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch(Generic[Item, Result]):
    """Items and who works on them: workers that each call `factory` once, or a task for each item."""

    items: Sequence[Item]
    description: str
    factory: Callable[[], Callable[[Item], Result]]
    num_workers: int | None = None  # None: tasks
    work: Work = "prepare"
    on_lost: Callable[[Item, str], Result] | None = None


class Executor(ABC):
    """Runs the work of stages. `calls` counts requests for work: a cached stage makes none."""

    def __init__(self) -> None:
        self.calls = 0

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], description: str
    ) -> Iterator[tuple[Item, Result]]:
        """Run `function` on every item as independent tasks; yields pairs as they finish, with progress.

        An exception in a task is raised here. `function` and items must pickle.
        """
        self.calls += 1
        return self.run(Batch(items, description, lambda: function))

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
            work: the kind of work; `run.resources` says what a worker of this kind asks of the cluster.
            on_lost: gives the result of an item that killed its worker every time it was tried, from the item
                and the reason. Without it `Incomplete` is raised for such items, once all others are done.
        """
        self.calls += 1
        return self.run(Batch(items, description, factory, num_actors, work, on_lost))

    def train(self, function: Training, job: TrainJob) -> None:
        """Call `function(job, make_engine, stop)` in each of `train.num_workers` workers; wait for them."""
        self.calls += 1
        self.launch(function, job)

    @abstractmethod
    def run(self, batch: Batch[Item, Result]) -> Iterator[tuple[Item, Result]]:
        """Work on a batch of `map` or `map_actors`."""

    @abstractmethod
    def launch(self, function: Training, job: TrainJob) -> None:
        """Run a training job of `train`."""

    def close(self) -> None:
        """Stop what was started."""
        return None


def stalled(description: str, run: Run, items: Sequence[Any] = ()) -> str:
    """What is said of work in which nothing ends any more."""
    names = f", waiting for {', '.join(logs.name_of(item) for item in items[:4])}" if items else ""
    return (
        f"{description}: nothing has ended for {run.stall_minutes:g} minutes{names}: a worker may hang, or "
        "each item takes longer than run.stall_minutes, which then must be raised. The same command resumes"
    )
