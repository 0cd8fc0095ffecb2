"""Where work runs: in this process, or on Ray (`ray_executor.py`).

Executors have the same three verbs: `map` (stateless tasks), `map_actors` (workers that keep models loaded
between items) and `train` (a group of data-parallel training workers). Only metadata travels through them;
tensors stay in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, Protocol, TypeVar

from pipeline.config.schema import Config, Work
from pipeline.errors import BadData
from pipeline.observe import logs
from pipeline.observe.progress import progress
from pipeline.train.engine import TorchEngine
from pipeline.train.job import TrainJob, run_job

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


def make_executor(config: Config) -> Executor:
    if config.run.executor == "inline":
        return InlineExecutor(config)
    from jobs.executors.ray_executor import RayExecutor

    return RayExecutor(config)


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
                with logs.item(logs.Place(logs.here().stage, logs.name_of(item), 1)):
                    result = function(item)
                yield item, result
                bar.update(1)

    def map_actors(
        self,
        factory: Callable[[], Callable[[Item], Result]],
        items: Sequence[Item],
        description: str,
        num_actors: int,
        work: Work,
        on_lost: Callable[[Item, str], Result] | None = None,
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
        work: Work,
        on_lost: Callable[[Item, str], Result] | None = None,
    ) -> Iterator[tuple[Item, Result]]:
        self._refuse(description)

    def train(self, job: TrainJob) -> None:
        self._refuse(f"training of {', '.join(job.outputs)}")

    def close(self) -> None:
        return None
