"""Mirrors a run into MLflow. The files are what counts: no computation reads anything back from MLflow.

Only the driver process writes: one pipeline run, below it a run per stage, below those a run per trained
model (its curves) and one per sweep point with γ as the step axis. All writes but the first go through one
thread (`writer.py`), so that the pipeline waits for MLflow at its end alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from jobs.executors.ray_job import RAY_JOB, job_id
from jobs.mlflow_address import Ui
from jobs.tracking.curves import Curves
from jobs.tracking.store import Run, Store, now_ms, open_store, put_folder
from jobs.tracking.sweep import Sweep
from jobs.tracking.writer import Writer
from pipeline.config.files import dump_config
from pipeline.config.schema import Config
from pipeline.errors import Incomplete
from pipeline.observe.events import Event, Training, listening
from pipeline.results.points import advice_of
from pipeline.store.provenance import provenance
from pipeline.store.rows import CellRow

if TYPE_CHECKING:
    from pipeline.results.recommend import Recommendation

log = logging.getLogger(__name__)

INTERRUPTED_S = 5.0  # what somebody who pressed Ctrl-C waits for; `ray job stop` kills soon after
MOST_COMPARED = 93  # runs in one compare link; the page is known to stay usable with so many


class Tracker:
    """One pipeline run in MLflow, as a context: FINISHED, FAILED or KILLED follows from how it is left.

    Methods queue writes and return at once. Leaving the context waits for what is queued. Without
    a store (`tracking.enabled: false`) whatever would be queued is dropped.
    """

    def __init__(self, config: Config, store: Store | None, run: Run) -> None:
        self.config, self.store, self.run = config, store, run
        self.writer = Writer()
        self.sweep: Sweep | None = None

    @staticmethod
    def start(config: Config, record: Path | None = None) -> Tracker:
        """Open the store, make the experiment where it is missing, begin the pipeline run.

        Args:
            record: folder of the run's record. Runs of other records whose driver was killed are ended.

        Raises:
            ConfigError: if the store cannot be reached or the experiment was deleted.
        """
        if not config.tracking.enabled:
            log.info("MLflow is off (tracking.enabled: false)")
            return Tracker(config, None, Run(config.name, {}))
        tags = {"stage": "pipeline", "dirty": str(provenance()["git_dirty"]).lower()}
        job = job_id()
        tags |= ({"record": record.name} if record else {}) | ({RAY_JOB: job} if job else {})
        run = Run(config.name, tags)
        tracker = Tracker(config, open_store(config, run), run)
        params = {"seed": config.seed, "train_steps": config.train.steps, "executor": config.run.executor}
        tracker.put("parameters of the run", partial(Store.log, run=run, params=params))
        if record:
            tracker.put("the end of killed runs", partial(Store.end_killed, records=record.parent))
        text = dump_config(config)
        tracker.put("config.yaml", lambda store: store.client.log_text(run.known(), text, "config.yaml"))
        return tracker

    def put(self, what: str, action: Callable[[Store], object], repeatable: bool = False) -> None:
        """Queue a write, as `Writer.put` does."""
        if self.store is not None:
            self.writer.put(what, partial(action, self.store), repeatable)

    def _put_end(self, what: str, run: Run, status: str) -> None:
        self.put(what, partial(Store.end, run=run, status=status, at_ms=now_ms()))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is queued.

        Raises:
            Incomplete: if MLflow took nothing for `tracking.wait_s`, unless the body raised.
        """
        status = _status(kind)
        self._put_end("the end of the run", self.run, status)
        if status == "KILLED":
            self.writer.drop_repeatable()
            left = self.writer.finish(INTERRUPTED_S, INTERRUPTED_S)
        else:
            left = self.writer.finish(self.config.tracking.wait_s)
        if self.store is not None:
            for piece in list(self.store.claimed):
                self.store.release(piece)
        if left:
            text = (
                f"{left} writes are not in MLflow (last answer: {self.writer.problem or 'none'}); results "
                f"are whole in {self.config.storage}, and the same command logs what is missing"
            )
            if kind is None:
                raise Incomplete(text)
            log.warning(text)

    @contextmanager
    def stage_run(self, name: str) -> Iterator[Run]:
        """A run for one stage below the pipeline run."""
        run = Run(name, {"stage": name}, self.run)
        self.put(f"the run of stage {name}", partial(Store.make, run=run))
        with _ending(partial(self._put_end, f"the end of stage {name}", run)):
            yield run

    @contextmanager
    def follow(
        self, stage_run: Run, files: Mapping[str, Path], upload_to: str | None = None
    ) -> Iterator[None]:
        """Mirror metrics files as curves: new rows while the body runs, what is left when it ends.

        Args:
            files: model name → its `metrics.jsonl`, which need not exist yet. Each gets a run of its name
                below `stage_run`; a file whose folder was mirrored whole before is left alone.
            upload_to: folder among the artifacts of `stage_run` that the finished models go to.
        """
        curves = {name: Curves(self.put, stage_run, name, file) for name, file in files.items()}

        def heard(stage: str, event: Event) -> None:
            if isinstance(event, Training):
                for model in event.models:
                    curves[model.name].log(model.rows)

        def finish(status: str) -> None:
            for model in curves.values():
                model.finish(status, upload_to)

        with _ending(finish), listening(heard):
            yield

    def log_models(self, stage_run: Run, files: Mapping[str, Path], upload_to: str | None = None) -> None:
        """Mirror the finished models that are not in MLflow yet, as `follow` would have done."""
        for name, file in files.items():
            Curves(self.put, stage_run, name, file).finish("FINISHED", upload_to)

    def log_sweep(self, stage_run: Run, sweep_id: str, rows: Iterable[CellRow]) -> None:
        """One run per sweep point, acceptance and speed against γ as the step. Safe to repeat.

        Args:
            sweep_id: the report's fingerprint, since a sweep that is tried again keeps its own fingerprint.
                Points that are already in MLflow under this id are not written again.
        """
        self.sweep = sweep = Sweep(sweep_id, rows, stage_run)
        self.put("the points of the sweep", sweep.find, repeatable=True)
        for key, run in sweep.runs.items():
            self.put(f"sweep point {run.name}", partial(sweep.log, key=key), repeatable=True)
        self.put("lock of the sweep", partial(Store.release, piece=sweep_id))

    def log_advice(self, run: Run, advice: Iterable[Recommendation]) -> None:
        """What to deploy in each place: a tag in words, and where there is a choice its expected speedup."""
        for place, tags, points in map(advice_of, advice):
            write = partial(Store.log, run=run, points=points, at_ms=now_ms(), tags=tags)
            self.put(f"the advice for {place}", write)

    def log_files(self, run: Run, paths: Iterable[Path]) -> None:
        """Files as artifacts of a run."""
        for path in paths:
            self.put(path.name, partial(Store.upload, run=run, file=path), repeatable=True)

    def log_folder(self, run: Run, folder: Path, name: str) -> None:
        """The files of a folder as artifacts of a run, below `name`."""
        put_folder(self.put, run, folder, Path(name))

    def links(self) -> list[str]:
        """Lines for the end of a run: where to look, and how to start the UI where no server runs."""
        if self.store is None:
            return []
        ui = Ui(self.store.uri, self.store.experiment_id)
        lines = [f"start the MLflow UI: {ui.command}"] if ui.command else []
        lines.append(f"this run: {ui.run(self.run.id)}")
        if self.sweep:
            metric = "speed/best_speedup" if self.sweep.measured else "accept/rate"
            lines.append(f"the sweep: {ui.table(self.sweep.query, metric)}")
            lines.append(f"compare: {ui.comparison(self.sweep.best(MOST_COMPARED))}")
        return lines


@contextmanager
def _ending(end: Callable[[str], None]) -> Iterator[None]:
    """Call `end` with the MLflow status that follows from how the body was left."""
    with ExitStack() as stack:
        stack.push(lambda kind, error, trace: end(_status(kind)))
        yield


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
