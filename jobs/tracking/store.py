"""Where MLflow keeps runs: its address, what is wrong with it, opening it, and writes to be repeated."""

from __future__ import annotations

import os
import sqlite3
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from jobs.records.record import lives
from jobs.tracking.writer import Refused
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.store.artifacts import LOCKS
from pipeline.store.files import write_text
from pipeline.store.provenance import provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as MlflowRun

RAY_JOB = "ray_job"  # tag of a pipeline run: the submission id of its job
BATCH = 1000  # MLflow's limit of metrics and parameters in one request
OPENING_S = 300  # the tables of a new database take seconds; much longer means that something hangs

OTHERS_S = 10.0  # for another process that mirrors the same piece; afterwards it is tried again

Point = tuple[str, float, int]  # name, value, step


def tracking_uri(config: Config) -> str:
    """The configured store, or a sqlite file in the storage folder."""
    return config.tracking.uri or f"sqlite:///{Path(config.storage).resolve()}/mlflow.db"


def is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def tracking_problem(uri: str) -> str | None:
    """Why this store cannot be used, or None. Asks a server for its health, for at most 5 seconds."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return "MLflow no longer keeps runs in plain folders: use sqlite:///FILE or a server's http address"
    if parts.scheme == "sqlite":
        if not uri.startswith("sqlite:///"):
            return "a sqlite file is written sqlite:///relative/path or sqlite:////absolute/path"
        return _sqlite_problem(Path(uri.removeprefix("sqlite:///")))
    elif is_server(uri):
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


def piece_lock(config: Config, piece: str) -> FileLock:
    """Held by the process that mirrors a piece of a storage, so that it is not mirrored twice at once."""
    # Taken in the writer's thread; where that gives up, freed in another.
    return FileLock(_locks(config) / f"mlflow-{piece}.lock", thread_local=False)


def storage_id(config: Config) -> str:
    """What tells this storage from others that mirror into the same store. To be called with a lock held."""
    file = _locks(config) / "storage-id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")


def _locks(config: Config) -> Path:
    folder = Path(config.storage).resolve() / LOCKS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"storage = {config.storage}: {folder} cannot be made: {error}") from None
    return folder


def open_store(config: Config, run: Run) -> Store:
    """The store of a config with a first run; tables and experiment are made where they are missing.

    Raises:
        ConfigError: if the store cannot be reached or the experiment was deleted.
    """
    uri = tracking_uri(config)
    file = _locks(config) / "mlflow.lock"
    try:
        # Two processes that open a new database at once break it for good.
        with FileLock(file, timeout=OPENING_S):
            problem = tracking_problem(uri)
            if problem:
                raise ConfigError(
                    f"tracking.uri = {uri}: {problem}; to run without, set tracking.enabled=false"
                )
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException

            try:
                client = MlflowClient(tracking_uri=uri)
                store = Store(client, uri, _experiment(client, config, uri), storage_id(config))
                store.make(run)
            except MlflowException as error:
                raise ConfigError(f"tracking.uri = {uri}: {error.message}") from None
            return store
    except Timeout:
        raise ConfigError(
            f"tracking.uri = {uri}: another process has been opening it for {OPENING_S} s; it holds {file}"
        ) from None


def _experiment(client: MlflowClient, config: Config, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server has its own place for artifacts.
        place = None if is_server(uri) else (Path(config.storage).resolve() / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # made from another storage just now
    if found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment = {name}: it was deleted in MLflow; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` or choose another name"
        )
    return str(found.experiment_id)


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(eq=False)
class Run:
    """A run that is in MLflow, or will be when the writer's thread comes to it."""

    name: str
    tags: Mapping[str, str]
    parent: Run | None = None
    began_ms: int = field(default_factory=now_ms)
    # Finds the run again whose making was asked for and not answered.
    write_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    asked: bool = False
    id: str = ""  # known once it is made

    def known(self) -> str:
        if not self.id:
            raise Refused(f"the run {self.name!r} that it belongs to could not be made")
        return self.id


class Store:
    """An experiment in MLflow. Every write may be repeated and then changes nothing."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, storage: str) -> None:
        self.client, self.uri, self.experiment_id, self.storage = client, uri, experiment_id, storage

    def make(self, run: Run) -> None:
        """Make a run that is not there yet."""
        if run.id:
            return
        commit = provenance()["git_sha"] or "unknown"
        tags = {**run.tags, "git_commit": commit, "write_id": run.write_id, "storage_id": self.storage}
        if run.parent:
            tags["mlflow.parentRunId"] = run.parent.known()
        found = next(self.search(f"tags.write_id = '{run.write_id}'"), None) if run.asked else None
        run.asked = True
        if found is None:
            found = self.client.create_run(
                self.experiment_id, start_time=run.began_ms, tags=tags, run_name=run.name
            )
        run.id = found.info.run_id

    def log(
        self,
        run: Run,
        params: Mapping[str, object],
        points: Sequence[Point],
        at_ms: int,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Parameters, points and tags of a run in as few requests as MLflow allows.

        Args:
            at_ms: the time of the points, Unix milliseconds; the same when this is repeated, or they double.
        """
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Metric] = [Metric(name, float(value), at_ms, step) for name, value, step in points]
        entities = [Param(name, str(value)) for name, value in params.items()]
        labels = [RunTag(name, value) for name, value in (tags or {}).items()]
        first = BATCH - len(entities) - len(labels)
        self.client.log_batch(run.known(), metrics[:first], entities, labels)
        for start in range(first, len(metrics), BATCH):
            self.client.log_batch(run.known(), metrics[start : start + BATCH])

    def end(self, run: Run, status: str, at_ms: int) -> None:
        """Give a run its status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run.known(), status, at_ms)

    def upload(self, run: Run, file: Path, folder: str | None) -> None:
        """A file as artifact of a run."""
        self.client.log_artifact(run.known(), str(file), folder)

    def search(self, query: str) -> Iterator[MlflowRun]:
        """The runs of the experiment that a query finds."""
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=5000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def whole(self, query: str) -> list[MlflowRun]:
        """The finished runs that a query finds. Those that a killed process left unfinished are deleted.

        To be called with a lock of the storage held: what another process is writing at present is
        unfinished as well. Another storage's unfinished runs are its own.
        """
        found = list(self.search(query))
        for run in found:
            if run.info.status == "RUNNING" and run.data.tags.get("storage_id") == self.storage:
                self.client.delete_run(run.info.run_id)
        return [run for run in found if run.info.status == "FINISHED"]

    def end_killed(self, records: Path) -> None:
        """Give the pipeline runs of this storage whose driver was killed, and their stages, an end.

        Args:
            records: folder of the storage's run records, which say whether a driver lives.
        """
        running = f"attributes.status = 'RUNNING' and tags.storage_id = '{self.storage}'"
        for run in list(self.search(f"{running} and tags.stage = 'pipeline'")):
            record = run.data.tags.get("record")
            if record is None or lives(records / record):
                continue
            below = self.search(f"{running} and tags.`mlflow.parentRunId` = '{run.info.run_id}'")
            for one in [*below, run]:
                self.client.set_terminated(one.info.run_id, "KILLED")
