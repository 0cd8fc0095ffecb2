"""Everything in one process, one thing after another."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.executors.base import Batch, Executor, Item, Result
from pipeline.config.schema import Config
from pipeline.observe import logs
from pipeline.observe.progress import progress
from pipeline.train.engine import TorchEngine
from pipeline.train.job import Training, TrainJob


class InlineExecutor(Executor):
    """Everything in this process, one thing after another; training with the plain torch engine."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def run(self, batch: Batch[Item, Result]) -> Iterator[tuple[Item, Result]]:
        function = batch.factory()
        with progress(len(batch.items), batch.description) as bar:
            for item in batch.items:
                with logs.item(logs.WorkItem(logs.here().stage, logs.name_of(item), 1)):
                    result = function(item)
                yield item, result
                bar.update(1)

    def launch(self, function: Training, job: TrainJob) -> None:
        train = job.config.train
        function(
            job,
            lambda model, schedule: TorchEngine(
                model,
                device=job.device,
                weight_decay=schedule.weight_decay,
                clip=schedule.clip,
                accumulation=schedule.micro_batches,
                bfloat16=train.dtype == "bfloat16",
            ),
            None,
        )
