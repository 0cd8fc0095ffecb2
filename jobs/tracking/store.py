"""MLflow's store of runs: opening it, and writes that may be repeated."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock, Timeout

from jobs.mlflow_address import is_server, tracking_problem, tracking_uri, where_given
from jobs.records.record import lives
from jobs.tracking.writer import Refused
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, disk_trouble
from pipeline.store.artifacts import LOCKS
from pipeline.store.files import write_text
from pipeline.store.provenance import provenance

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

OPENING_S = 300  # the tables of a new database take seconds; much longer means that something hangs
WITHOUT = "to run without, set tracking.enabled=false"
OTHERS_S = 10.0  # wait for another process that mirrors the same piece; then the write is tried again


def open_store(config: Config, run: Run) -> Store:
    """The store of a config with a first run; tables and experiment are made where they are missing.

    Raises:
        ConfigError: if storage or store cannot be reached, or the experiment was deleted.
    """
    uri, locks = tracking_uri(config), Path(config.storage).resolve() / LOCKS
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_trouble(error):
            raise
        raise ConfigError(f"storage = {config.storage}: {locks} cannot be made: {error}") from None
    given, file = where_given(config), locks / "mlflow.lock"
    try:
        # Two processes that open a new database at once break it for good.
        with FileLock(file, timeout=OPENING_S):
            if problem := tracking_problem(uri):
                raise ConfigError(f"{given}: {problem}; {WITHOUT}")
            from mlflow import MlflowClient

            try:
                client = MlflowClient(tracking_uri=uri)
                store = Store(client, uri, _experiment(client, config, uri), locks)
                store.make(run)
            except ConfigError:
                raise
            except Exception as error:  # stores raise whatever their databases' libraries raise
                if disk_trouble(error):
                    raise
                first = (str(error).strip().splitlines() or [""])[0]
                raise ConfigError(f"{given}: {type(error).__name__}: {first}; {WITHOUT}") from error
            return store
    except Timeout:
        raise ConfigError(
            f"{given}: another process has been opening it for {OPENING_S} s; it holds {file}"
        ) from None


def _experiment(client: MlflowClient, config: Config, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    name = config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # A server has its own place for artifacts.
        place = None if is_server(uri) else (Path(config.storage).resolve() / "mlartifacts").as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # made from another storage just now
    if experiment.lifecycle_stage == "deleted":
        raise ConfigError(
            f"tracking.experiment = {name}: it was deleted in MLflow; restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` or choose another name"
        )
    return str(experiment.experiment_id)


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(eq=False)
class Run:
    """A run that is in MLflow, or will be when the writer's thread comes to it."""

    name: str
    tags: Mapping[str, str]
    parent: Run | None = None
    began_ms: int = field(default_factory=now_ms)
    # Finds a run again if MLflow was asked to make it and did not answer.
    write_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    asked: bool = False
    id: str = ""  # known once it is made

    def known(self) -> str:
        if not self.id:
            raise Refused(f"the run {self.name!r} that it belongs to could not be made")
        return self.id


class Store:
    """An experiment in MLflow. Every write may be repeated and then changes nothing."""

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, locks: Path) -> None:
        """To be called with a lock of the storage held; `locks` is the folder of its locks."""
        self.client, self.uri, self.experiment_id, self.locks = client, uri, experiment_id, locks
        file = locks / "storage-id"
        if not file.exists():
            write_text(file, uuid.uuid4().hex)
        # Tells this storage from others that mirror into the same store.
        self.storage = file.read_text(encoding="utf-8")
        self.claimed: dict[str, FileLock] = {}

    def make(self, run: Run) -> None:
        """Make a run that is not there yet."""
        if run.id:
            return
        commit = provenance()["git_sha"] or "unknown"
        tags = {**run.tags, "git_commit": commit, "write_id": run.write_id, "storage_id": self.storage}
        if run.parent:
            tags["mlflow.parentRunId"] = run.parent.known()
        made = next(self.search(f"tags.write_id = '{run.write_id}'"), None) if run.asked else None
        run.asked = True
        if made is None:
            made = self.client.create_run(
                self.experiment_id, start_time=run.began_ms, tags=tags, run_name=run.name
            )
        run.id = made.info.run_id

    def log(
        self,
        run: Run,
        params: Mapping[str, object] | None = None,
        points: Sequence[tuple[str, float, int]] = (),
        at_ms: int = 0,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Parameters, points and tags of a run; the client sends them in as few requests as MLflow allows.

        Args:
            points: name, value, step.
            at_ms: the time of the points, Unix milliseconds; a repeat with another time would double them.
        """
        from mlflow.entities import Metric, Param, RunTag

        self.client.log_batch(
            run.known(),
            [Metric(name, float(value), at_ms, step) for name, value, step in points],
            [Param(name, str(value)) for name, value in (params or {}).items()],
            [RunTag(name, value) for name, value in (tags or {}).items()],
        )

    def end(self, run: Run, status: str, at_ms: int) -> None:
        """Give a run its status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run.known(), status, at_ms)

    def upload(self, run: Run, file: Path, folder: Path | None = None) -> None:
        """A file as artifact of a run."""
        self.client.log_artifact(run.known(), str(file), folder and str(folder))

    def search(self, query: str) -> Iterator[MlflowRun]:
        """The runs of the experiment that a query finds."""
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=5000, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def claim(self, piece: str, query: str) -> list[MlflowRun]:
        """Keep other processes from mirroring a piece of this storage until it is released.

        Returns:
            The finished runs among those that `query` finds. Runs that a killed process of this storage has
            left unfinished are deleted.

        Raises:
            Timeout: if another process mirrors it at present.
        """
        # Taken in the writer's thread; freed in another thread if the writer gives up.
        file = self.locks / f"mlflow-{piece}.lock"
        lock = self.claimed.setdefault(piece, FileLock(file, timeout=OTHERS_S, thread_local=False))
        if not lock.is_locked:
            lock.acquire()
        runs = list(self.search(query))
        for run in runs:
            if run.info.status == "RUNNING" and run.data.tags.get("storage_id") == self.storage:
                self.client.delete_run(run.info.run_id)
        return [run for run in runs if run.info.status == "FINISHED"]

    def release(self, piece: str) -> None:
        if piece in self.claimed:
            self.claimed.pop(piece).release()

    def end_killed(self, records: Path) -> None:
        """End the pipeline runs of this storage whose driver was killed, and the runs of their stages.

        Args:
            records: folder of the storage's run records, which say whether a driver lives.
        """
        running = f"attributes.status = 'RUNNING' and tags.storage_id = '{self.storage}'"
        for run in list(self.search(f"{running} and tags.stage = 'pipeline'")):
            record = run.data.tags.get("record")
            if record is None or lives(records / record):
                continue
            below = self.search(f"{running} and tags.`mlflow.parentRunId` = '{run.info.run_id}'")
            for killed in [*below, run]:
                self.client.set_terminated(killed.info.run_id, "KILLED")


class Put(Protocol):
    """Queues a write, as `Writer.put` does; the store is known when its turn comes."""

    def __call__(self, what: str, action: Callable[[Store], object], repeatable: bool = False) -> None: ...


def put_folder(put: Put, run: Run, folder: Path, below: Path) -> None:
    """Queue the files of a folder as artifacts of a run, below this place."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        place = below / file.parent.relative_to(folder)
        put(file.name, partial(Store.upload, run=run, file=file, folder=place), repeatable=True)
