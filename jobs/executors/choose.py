"""Which executor a config asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from jobs.executors.base import Batch, Executor, Item, Result
from jobs.executors.inline import InlineExecutor
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.train.job import Training, TrainJob


def make_executor(config: Config) -> Executor:
    if config.run.executor == "inline":
        return InlineExecutor(config)
    from jobs.executors.ray_executor import RayExecutor

    return RayExecutor(config)


class NoExecutor(Executor):
    """For reading complete stages: a request for work raises BadData that says to run the pipeline first."""

    def run(self, batch: Batch[Item, Result]) -> Iterator[tuple[Item, Result]]:
        refuse(batch.description)

    def launch(self, function: Training, job: TrainJob) -> None:
        refuse(f"training of {', '.join(job.outputs)}")


def refuse(what: str) -> NoReturn:
    raise BadData(f"{what} is not done for this config; run `budgetdraft run CONFIG` first")
