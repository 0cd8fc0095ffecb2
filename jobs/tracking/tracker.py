"""Mirrors a run into MLflow. Files are the truth; nothing is ever read back from here to compute with.

Only the driver process writes: one pipeline run, below it a run per stage, below those a run per trained
model (its curves) and one per sweep point with γ as the step axis. All writes but the first go through one
thread (`tracking_writer.py`), so that the pipeline waits for MLflow at its end alone.
"""

from __future__ import annotations

import json
import logging
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

from filelock import FileLock

from jobs.executors.ray_job import job_id
from jobs.tracking.curves import Curves
from jobs.tracking.store import RAY_JOB, Run, Store, is_server, now_ms, open_store, piece_lock
from jobs.tracking.sweep import Sweep, bounds, point_key, point_name
from jobs.tracking.writer import Writer
from pipeline.config.files import dump_config
from pipeline.config.schema import Config
from pipeline.errors import Incomplete, hide_credentials
from pipeline.store.provenance import provenance
from pipeline.store.rows import CellRow

if TYPE_CHECKING:
    from pipeline.results.recommend import Recommendation

log = logging.getLogger(__name__)

POLL_S = 2.0
INTERRUPTED_S = 5.0  # what somebody who pressed Ctrl-C waits for; `ray job stop` kills soon after
MOST_COMPARED = 93  # runs in one compare link; the page is known to stay usable with so many


class Tracker:
    """One pipeline run in MLflow, as a context: FINISHED, FAILED or KILLED follows from how it is left.

    Methods queue what they are told and return at once. Leaving the context waits for what is queued.
    """

    def __init__(self, config: Config, store: Store, run: Run) -> None:
        self.config, self.store, self.run = config, store, run
        self.writer = Writer()
        self.sweep: Sweep | None = None
        self.locks: list[FileLock] = []

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
            return NullTracker()
        tags = {"stage": "pipeline", "dirty": str(provenance()["git_dirty"]).lower()}
        job = job_id()
        tags |= ({"record": record.name} if record else {}) | ({RAY_JOB: job} if job else {})
        run = Run(config.name, tags)
        tracker = Tracker(config, open_store(config, run), run)
        params = {"seed": config.seed, "train_steps": config.train.steps, "executor": config.run.executor}
        tracker.writer.put("parameters of the run", partial(tracker.store.log, run, params, (), now_ms()))
        if record:
            tracker.writer.put("the end of killed runs", partial(tracker.store.end_killed, record.parent))
        text = dump_config(config)
        tracker.writer.put(
            "config.yaml", lambda: tracker.store.client.log_text(run.known(), text, "config.yaml")
        )
        return tracker

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is queued.

        Raises:
            Incomplete: if MLflow took nothing for `tracking.wait_s`, unless the body raised.
        """
        self.writer.put("the end of the run", partial(self.store.end, self.run, _status(kind), now_ms()))
        if _status(kind) == "KILLED":
            self.writer.drop_repeatable()
            left = self.writer.finish(INTERRUPTED_S, INTERRUPTED_S)
        else:
            left = self.writer.finish(self.config.tracking.wait_s)
        for held in self.locks:
            held.release()
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
        self.writer.put(f"the run of stage {name}", partial(self.store.make, run))
        with _ending(lambda status: self._end(run, status)):
            yield run

    @contextmanager
    def follow(
        self, stage_run: Run, files: Mapping[str, Path], upload_to: str | None = None
    ) -> Iterator[None]:
        """Mirror growing metrics files as curves while the body runs, and what is left when it ends.

        Args:
            files: model name → its `metrics.jsonl`, which need not exist yet. Each gets a run of its name
                below `stage_run`; a file whose folder was mirrored whole before is left alone.
            upload_to: folder among the artifacts of `stage_run` that the finished models go to.
        """
        models = self._curves(stage_run, files)
        stop = threading.Event()

        def poll() -> None:
            while not stop.wait(POLL_S):
                for model in models:
                    model.poll()

        thread = threading.Thread(target=poll, name="mlflow-curves", daemon=True)

        def finish(status: str) -> None:
            stop.set()
            thread.join()
            for model in models:
                model.poll()
                if upload_to and status == "FINISHED":
                    model.upload(upload_to)
                model.close(status)

        thread.start()
        with _ending(finish):
            yield

    def log_models(self, stage_run: Run, files: Mapping[str, Path], upload_to: str | None = None) -> None:
        """Mirror the finished models that are not in MLflow yet, as `follow` would have done."""
        for model in self._curves(stage_run, files):
            model.poll(wait=True)
            if upload_to:
                model.upload(upload_to, wait=True)
            model.close("FINISHED")

    def log_sweep(self, stage_run: Run, sweep_id: str, rows: Iterable[CellRow]) -> None:
        """One run per sweep point, acceptance and speed against γ as the step. Safe to repeat.

        Args:
            sweep_id: the sweep's fingerprint; points that it already has in MLflow are not written again.
        """
        points: dict[str, list[CellRow]] = {}
        for row in rows:
            points.setdefault(point_key(row.cell), []).append(row)
        self.sweep = sweep = Sweep(self.store, sweep_id, points, self._lock(sweep_id))
        self.writer.put("the points of the sweep", sweep.find, repeatable=True)
        for key, cells in points.items():
            run = Run(point_name(cells[0].cell), sweep.tags | {"cell_key": key}, stage_run)
            self.writer.put(f"sweep point {run.name}", partial(sweep.log, key, run), repeatable=True)
        self.writer.put("lock of the sweep", sweep.lock.release)

    def log_advice(self, run: Run, advice: Iterable[Recommendation]) -> None:
        """What to deploy in each place: a tag in words, and where there is a choice its expected speedup."""
        from pipeline.results.recommend import settings_text  # torch is slow to import

        for one in advice:
            place = f"{one.dataset}.{one.context}"
            text, points = one.why, []
            if one.choice:
                text = f"{settings_text(one.choice.cell)}: {one.why}"
                speed = bounds("recommend/speedup", one.choice.expected)
                points = [(f"{name}.{place}", value, 0) for name, value in speed.items()]
            tags = {f"recommend.{place}": text}
            self.writer.put(
                f"the advice for {place}", partial(self.store.log, run, {}, points, now_ms(), tags)
            )

    def log_files(self, run: Run, paths: Iterable[Path]) -> None:
        """Files as artifacts of a run."""
        for path in paths:
            self.writer.put(path.name, partial(self.store.upload, run, path, None), repeatable=True)

    def log_folder(self, run: Run, folder: Path, name: str) -> None:
        """The files of a folder as artifacts of a run, below `name`."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            below = str(Path(name) / path.parent.relative_to(folder))
            self.writer.put(path.name, partial(self.store.upload, run, path, below), repeatable=True)

    def links(self) -> list[str]:
        """Lines for the end of a run: where to look, and how to start the UI where no server runs."""
        uri = hide_credentials(self.store.uri)
        server = is_server(self.store.uri)
        base = uri.replace("***@", "").rstrip("/") if server else "http://127.0.0.1:5000"
        experiment = self.store.experiment_id
        lines = []
        if not server:
            lines.append(f"start the MLflow UI: mlflow ui --backend-store-uri {shlex.quote(uri)} --port 5000")
        lines.append(f"this run: {base}/#/experiments/{experiment}/runs/{self.run.id}")
        if self.sweep:
            search = quote(f"tags.sweep_id = '{self.sweep.sweep_id}' AND tags.stage = 'cell'", safe="")
            metric = quote("`speed/best_speedup`" if self.sweep.measured else "`accept/rate`", safe="")
            lines.append(
                f"the sweep: {base}/#/experiments/{experiment}/runs?searchFilter={search}"
                f"&orderByKey=metrics.{metric}&orderByAsc=false&compareRunsMode=CHART"
            )
            runs = quote(json.dumps(self.sweep.best(MOST_COMPARED), separators=(",", ":")), safe="")
            experiments = quote(json.dumps([experiment]), safe="")
            lines.append(f"compare: {base}/#/compare-runs?runs={runs}&experiments={experiments}")
        return lines

    def _end(self, run: Run, status: str) -> None:
        self.writer.put(f"the end of stage {run.name}", partial(self.store.end, run, status, now_ms()))

    def _lock(self, piece: str) -> FileLock:
        self.locks.append(piece_lock(self.config, piece))
        return self.locks[-1]

    def _curves(self, stage_run: Run, files: Mapping[str, Path]) -> list[Curves]:
        return [
            Curves(self.store, self.writer, self._lock(path.parent.name), stage_run, name, path)
            for name, path in files.items()
        ]


class NullTracker(Tracker):
    """Takes everything and keeps nothing: `tracking.enabled: false`."""

    def __init__(self) -> None:
        self.run = Run("", {})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @contextmanager
    def stage_run(self, name: str) -> Iterator[Run]:
        yield self.run

    @contextmanager
    def follow(
        self, stage_run: Run, files: Mapping[str, Path], upload_to: str | None = None
    ) -> Iterator[None]:
        yield

    def log_models(self, stage_run: Run, files: Mapping[str, Path], upload_to: str | None = None) -> None:
        return None

    def log_sweep(self, stage_run: Run, sweep_id: str, rows: Iterable[CellRow]) -> None:
        return None

    def log_advice(self, run: Run, advice: Iterable[Recommendation]) -> None:
        return None

    def log_files(self, run: Run, paths: Iterable[Path]) -> None:
        return None

    def log_folder(self, run: Run, folder: Path, name: str) -> None:
        return None

    def links(self) -> list[str]:
        return []


@contextmanager
def _ending(end: Callable[[str], None]) -> Iterator[None]:
    """Call `end` with the MLflow status that the way the body was left calls for."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        end(status)


def _status(kind: type[BaseException] | None) -> str:
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
