"""Which executor a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from jobs.executors.base import Executor, Item, Result
from jobs.executors.inline import InlineExecutor
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.train.job import TrainJob


def make_executor(config: Config) -> Executor:
    if config.run.executor == "inline":
        return InlineExecutor(config)
    from jobs.executors.ray_executor import RayExecutor

    return RayExecutor(config)


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
