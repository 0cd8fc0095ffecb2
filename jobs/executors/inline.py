"""Everything in one process, one thing after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jobs.executors.base import Item, Result
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.observe import logs
from pipeline.observe.progress import progress
from pipeline.train.engine import TorchEngine
from pipeline.train.job import TrainJob, run_job


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
                with logs.item(logs.WorkItem(logs.here().stage, logs.name_of(item), 1)):
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
            lambda model, schedule: TorchEngine(
                model,
                device=job.device,
                weight_decay=schedule.weight_decay,
                clip=schedule.clip,
                accumulation=schedule.micro_batches,
                bfloat16=train.dtype == "bfloat16",
            ),
        )

    def close(self) -> None:
        return None
