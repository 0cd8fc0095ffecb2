"""Mirrors a run into MLflow. Files are the truth; nothing is ever read back from here to compute with.

The only file that imports mlflow. Only the driver process writes: one pipeline run, below it a run per
stage, below those a run per trained model (its curves) and one per sweep point with γ as the step axis.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from jobs.sweep_points import axes, point_key, point_metrics, point_name
from pipeline.artifacts import provenance
from pipeline.config import Config
from pipeline.config_errors import ConfigError, hide_credentials
from pipeline.config_files import dump_config
from pipeline.progress import progress
from pipeline.rows import CellRow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

    from pipeline.recommend import Recommendation

log = logging.getLogger(__name__)

POLL_S = 2.0
BATCH = 1000  # MLflow's limit of metrics in one request
MOST_COMPARED = 93  # runs in one compare link; the page is known to stay usable with so many


def tracking_uri(config: Config) -> str:
    """The configured store, or a sqlite file in the storage folder."""
    return config.tracking.uri or f"sqlite:///{Path(config.storage).resolve()}/mlflow.db"


def tracking_problem(uri: str) -> str | None:
    """Why this store cannot be used, or None. Asks a server for its health, for at most 5 seconds."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return "MLflow no longer keeps runs in plain folders: use sqlite:///FILE or a server's http address"
    if parts.scheme == "sqlite":
        if not uri.startswith("sqlite:///"):
            return "a sqlite file is written sqlite:///relative/path or sqlite:////absolute/path"
        return _sqlite_problem(Path(uri.removeprefix("sqlite:///")))
    elif parts.scheme in ("http", "https"):
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):  # a server that asks for a login is there
                return f"{address} answers {error.code} {error.reason}"
        except (OSError, ValueError) as error:
            return f"no server answers at {address}: {getattr(error, 'reason', error)}"
    return None


def _sqlite_problem(file: Path) -> str | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return None if os.access(file.parent, os.W_OK) else f"the folder {file.parent} cannot be written"
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except (OSError, sqlite3.Error) as error:
        return f"{file} cannot be written: {error}"
    return None


class Tracker:
    """One pipeline run in MLflow, as a context: FINISHED, FAILED or KILLED follows from how it is left."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, run_id: str) -> None:
        self.client, self.uri = client, uri
        self.experiment_id, self.run_id = experiment_id, run_id
        self.sweep_id: str | None = None
        self.cell_runs: list[str] = []  # ids, best first
        self.measured = False

    @staticmethod
    def start(config: Config) -> Tracker:
        """Open the store, make the experiment where it is missing, begin the pipeline run.

        Raises:
            ConfigError: if the store cannot be reached or the experiment was deleted.
        """
        if not config.tracking.enabled:
            log.info("MLflow is off (tracking.enabled: false)")
            return NullTracker()
        uri = tracking_uri(config)
        problem = tracking_problem(uri)
        if problem:
            raise ConfigError(f"tracking.uri = {uri}: {problem}; to run without, set tracking.enabled=false")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            client = MlflowClient(tracking_uri=uri)
            experiment_id = _experiment(client, config, uri)
        except MlflowException as error:
            raise ConfigError(f"tracking.uri = {uri}: {error.message}") from None
        tags = {"stage": "pipeline", "dirty": str(provenance()["git_dirty"]).lower(), **_commit()}
        run_id = client.create_run(experiment_id, run_name=config.name, tags=tags).info.run_id
        tracker = Tracker(client, uri, experiment_id, run_id)
        params = {"seed": config.seed, "train_steps": config.train.steps, "executor": config.run.executor}
        tracker._log_params(run_id, params)
        client.log_text(run_id, dump_config(config), "config.yaml")
        return tracker

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.set_terminated(self.run_id, _status(kind))

    @contextmanager
    def stage_run(self, name: str) -> Iterator[str]:
        """A run for one stage below the pipeline run; yields its id."""
        run_id = self._child(self.run_id, name, {"stage": name}).info.run_id
        with _ending(lambda status: self.client.set_terminated(run_id, status)):
            yield run_id

    @contextmanager
    def follow(self, stage_run: str, files: Mapping[str, Path]) -> Iterator[None]:
        """Mirror growing metrics files as curves while the body runs, and what is left when it ends.

        Args:
            files: model name → its `metrics.jsonl`, which need not exist yet. Each gets a run of its name
                below `stage_run`; a file whose folder was mirrored whole before is left alone.
        """
        curves = _Curves(self, stage_run, files)
        stop = threading.Event()

        def poll() -> None:
            while not stop.wait(POLL_S):
                curves.poll()

        thread = threading.Thread(target=poll, name="mlflow-curves", daemon=True)

        def finish(status: str) -> None:
            stop.set()
            thread.join()
            curves.poll()
            curves.close(status)

        thread.start()
        with _ending(finish):
            yield

    def log_sweep(self, stage_run: str, sweep_id: str, rows: Iterable[CellRow]) -> None:
        """One run per sweep point, acceptance and speed against γ as the step. Safe to repeat.

        Args:
            sweep_id: the sweep's fingerprint; points that it already has in MLflow are not written again.
        """
        points: dict[str, list[CellRow]] = {}
        for row in rows:
            points.setdefault(point_key(row), []).append(row)
        present = self._cells(sweep_id)
        missing = [key for key in points if key not in present]
        with progress(len(missing), "mlflow") as bar:
            for key in missing:
                present[key] = self._log_point(stage_run, sweep_id, key, points[key])
                bar.update(1)
        self.sweep_id = sweep_id
        self.measured = any(row.speedup is not None for cells in points.values() for row in cells)
        ranked = sorted(
            points, key=lambda key: -max(row.speedup or row.acceptance or 0.0 for row in points[key])
        )
        self.cell_runs = [present[key] for key in ranked]

    def log_advice(self, run_id: str, advice: Iterable[Recommendation]) -> None:
        """What to deploy in each place: a tag in words, and where there is a choice its expected speedup."""
        for one in advice:
            place = f"{one.dataset}.{one.context}"
            text = one.why
            if one.choice:
                cell = one.choice
                text = f"{cell.drafter} {cell.policy} B={cell.budget} γ={cell.gamma}"
                for name, value in zip(("", "_low", "_high"), cell.expected, strict=True):
                    self.client.log_metric(run_id, f"recommend/speedup{name}.{place}", value)
            self.client.set_tag(run_id, f"recommend.{place}", text)

    def log_files(self, run_id: str, paths: Iterable[Path]) -> None:
        """Files as artifacts of a run."""
        for path in paths:
            self.client.log_artifact(run_id, str(path))

    def log_folder(self, run_id: str, folder: Path, name: str) -> None:
        """A folder as artifacts of a run, below `name`."""
        self.client.log_artifacts(run_id, str(folder), name)

    def links(self) -> list[str]:
        """Lines for the end of a run: where to look, and how to start the UI where no server runs."""
        server = urlsplit(self.uri).scheme in ("http", "https")
        base = (
            hide_credentials(self.uri).replace("***@", "").rstrip("/") if server else "http://127.0.0.1:5000"
        )
        lines = []
        if not server:
            store = shlex.quote(hide_credentials(self.uri))
            lines.append(f"start the MLflow UI: mlflow ui --backend-store-uri {store} --port 5000")
        lines.append(f"this run: {base}/#/experiments/{self.experiment_id}/runs/{self.run_id}")
        if self.sweep_id:
            search = quote(f"tags.sweep_id = '{self.sweep_id}' AND tags.stage = 'cell'", safe="")
            metric = quote("`speed/best_speedup`" if self.measured else "`accept/rate`", safe="")
            lines.append(
                f"the sweep: {base}/#/experiments/{self.experiment_id}/runs?searchFilter={search}"
                f"&orderByKey=metrics.{metric}&orderByAsc=false&compareRunsMode=CHART"
            )
            runs = quote(json.dumps(self.cell_runs[:MOST_COMPARED], separators=(",", ":")), safe="")
            experiments = quote(json.dumps([self.experiment_id]), safe="")
            lines.append(f"compare: {base}/#/compare-runs?runs={runs}&experiments={experiments}")
        return lines

    def _child(self, parent: str, name: str, tags: dict[str, str]) -> Run:
        tags = {"mlflow.parentRunId": parent, **tags, **_commit()}
        return self.client.create_run(self.experiment_id, run_name=name, tags=tags)

    def _search(self, query: str) -> Iterator[Run]:
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=5000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _cells(self, sweep_id: str) -> dict[str, str]:
        """Finished points of a sweep, key → run id. Those that a killed process left half-written go."""
        finished = {}
        for run in self._search(f"tags.sweep_id = '{sweep_id}' and tags.stage = 'cell'"):
            if run.info.status == "FINISHED":
                finished[run.data.tags["cell_key"]] = run.info.run_id
            else:
                self.client.delete_run(run.info.run_id)
        return finished

    def _log_point(self, stage_run: str, sweep_id: str, key: str, cells: Sequence[CellRow]) -> str:
        tags = {"stage": "cell", "sweep_id": sweep_id, "cell_key": key}
        run_id = self._child(stage_run, point_name(cells[0]), tags).info.run_id
        self._log_params(run_id, axes(cells[0]), point_metrics(cells))
        self.client.set_terminated(run_id, "FINISHED")
        return str(run_id)

    def _log_params(
        self, run_id: str, params: Mapping[str, object], points: Sequence[tuple[str, float, int]] = ()
    ) -> None:
        """Parameters and (name, value, step) points of a run in as few requests as MLflow allows."""
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics: list[Metric] = [Metric(name, float(value), now, step) for name, value, step in points]
        entities = [Param(name, str(value)) for name, value in params.items()]
        self.client.log_batch(run_id, metrics[:BATCH], entities)
        for first in range(BATCH, len(metrics), BATCH):
            self.client.log_batch(run_id, metrics[first : first + BATCH])


class NullTracker(Tracker):
    """Takes everything and keeps nothing: `tracking.enabled: false`."""

    def __init__(self) -> None:
        self.run_id = ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @contextmanager
    def stage_run(self, name: str) -> Iterator[str]:
        yield ""

    @contextmanager
    def follow(self, stage_run: str, files: Mapping[str, Path]) -> Iterator[None]:
        yield

    def log_sweep(self, stage_run: str, sweep_id: str, rows: Iterable[CellRow]) -> None:
        return None

    def log_advice(self, run_id: str, advice: Iterable[Recommendation]) -> None:
        return None

    def log_files(self, run_id: str, paths: Iterable[Path]) -> None:
        return None

    def log_folder(self, run_id: str, folder: Path, name: str) -> None:
        return None

    def links(self) -> list[str]:
        return []


class _Curves:
    """What of each metrics file is mirrored. A step is logged once, however often its file is rewritten."""

    def __init__(self, tracker: Tracker, stage_run: str, files: Mapping[str, Path]) -> None:
        self.tracker, self.stage_run = tracker, stage_run
        self.files: dict[str, Path] = {}
        for name, path in files.items():
            query = f"tags.artifact = '{path.parent.name}' and attributes.status = 'FINISHED'"
            if not any(tracker._search(query)):
                self.files[name] = path
        self.runs: dict[str, str] = {}
        self.logged: dict[str, set[float]] = {name: set() for name in self.files}

    def poll(self) -> None:
        """Log the rows that are new. A store that fails is tried again the next time."""
        from mlflow.exceptions import MlflowException

        from pipeline.training import read_metrics  # imports torch

        for name, path in self.files.items():
            rows = [row for row in read_metrics(path) if row["step"] not in self.logged[name]]
            if not rows:
                continue
            points = [
                (key, value, int(row["step"])) for row in rows for key, value in row.items() if key != "step"
            ]
            try:
                if name not in self.runs:
                    tags = {"stage": "curves", "artifact": path.parent.name}
                    self.runs[name] = self.tracker._child(self.stage_run, name, tags).info.run_id
                self.tracker._log_params(self.runs[name], {"model": name}, points)
            except MlflowException as error:
                log.warning("MLflow did not take the curves of %s: %s", name, hide_credentials(str(error)))
            else:
                self.logged[name] |= {row["step"] for row in rows}

    def close(self, status: str) -> None:
        for run_id in self.runs.values():
            self.tracker.client.set_terminated(run_id, status)


def _experiment(client: MlflowClient, config: Config, uri: str) -> str:
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        server = urlsplit(uri).scheme in ("http", "https")  # a server has its own place for artifacts
        place = None if server else (Path(config.storage).resolve() / "mlartifacts").as_uri()
        return str(client.create_experiment(name, artifact_location=place))
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment = {name}: it was deleted in MLflow; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` or choose another name"
        )
    return str(found.experiment_id)


def _commit() -> dict[str, str]:
    return {"git_commit": provenance()["git_sha"] or "unknown"}


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
