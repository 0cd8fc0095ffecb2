"""The record of a pipeline run, `<storage>/run-records/<name>-<UTC time>-<4 hex>/`, which `status` reads.

`status.json` says what is done and running, `*.jsonl` are the logs, and `alive.lock` is held by the driver
while it lives. If the record cannot be written, as on a full disk, the run goes on.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel

from jobs import Terminated, was_terminated
from pipeline.config.models import ScratchModel
from pipeline.config.schema import Config
from pipeline.errors import Incomplete, hide_credentials
from pipeline.observe import events, logs
from pipeline.store.files import fingerprint, write_json
from pipeline.store.layout import IMPROVE, Until, stages_until

RECORDS, STATUS, ALIVE = "run-records", "status.json", "alive.lock"
KEPT = 50  # records of a storage
REFRESH_S = 1.0

State = Literal["waiting", "running", "done", "incomplete", "failed", "killed"]
log = logging.getLogger(__name__)


class WorkRecord(BaseModel):
    """The present work of a stage, in items or training steps. `initial` of them were done when it began."""

    description: str
    began: datetime
    initial: int
    done: int
    total: int
    failed: int = 0
    retried: int = 0


class StageRecord(BaseModel):
    """One stage. `failed` and `retried` count items over all of its work."""

    name: str
    state: State = "waiting"
    started: datetime | None = None
    seconds: float | None = None
    cached: bool | None = None
    folders: list[str] = []
    failed: int = 0
    retried: int = 0
    work: WorkRecord | None = None


class RunStatus(BaseModel):
    """One run. `until` is its last stage, `name` its config's name, `ended` one line on how it ended."""

    name: str
    until: str
    host: str
    pid: int
    config_fingerprint: str
    started: datetime
    updated: datetime
    state: State
    ended: str = ""
    stages: list[StageRecord]


class RunRecord:
    """A context that keeps the record of this process's run; how the body is left is how the run ended."""

    def __init__(self, config: Config, until: Until) -> None:
        now = datetime.now(UTC)
        self.config, self.records = config, Path(config.storage) / RECORDS
        self.folder = self.records / f"{config.name}-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        self.status = RunStatus(
            name=config.name,
            until=until,
            host=socket.gethostname(),
            pid=os.getpid(),
            config_fingerprint=fingerprint(config),
            started=now,
            updated=now,
            state="running",
            stages=[StageRecord(name=name) for name in stages_until(until)],
        )
        self.training: StageRecord | None = None  # the stage whose training steps are counted
        self.mutex = threading.RLock()  # events come from the pipeline, the rest from the refreshing thread
        self.over = threading.Event()
        self.written = ""
        self.complained = False

    def __enter__(self) -> RunRecord:
        self.alive = FileLock(self.folder / ALIVE)
        try:
            self.folder.mkdir(parents=True)
            self.alive.acquire(timeout=0)
            prune(self.records)
        except OSError as error:
            self._complain(error)
        self.contexts = ExitStack()
        self.contexts.enter_context(logs.logging_to(self.folder))
        self.contexts.enter_context(events.listening(self.heard))
        self.write()
        self.refreshing = threading.Thread(target=self._refresh_until_over, daemon=True)
        self.refreshing.start()
        log.info("the record of this run is %s; `budgetdraft status` reads it", self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self.refreshing.join()
        with self.mutex:
            self.status.state, self.status.ended = how_it_ended(error)
            for stage in self.status.stages:
                if stage.state == "running":
                    self._end(stage, self.status.state)
        self.write()
        self.contexts.close()
        self.alive.release()

    @contextmanager
    def stage(self, name: str) -> Iterator[StageRecord]:
        """A stage runs in the body, which may set `cached`."""
        stage = next(stage for stage in self.status.stages if stage.name == name)
        stage.state, stage.started = "running", datetime.now(UTC)
        self.write()
        try:
            with logs.at(logs.WorkItem(stage=name)):
                yield stage
        except BaseException as error:
            self._end(stage, how_it_ended(error)[0])
            raise
        self._end(stage, "done")
        self.write()

    def _end(self, stage: StageRecord, state: State) -> None:
        assert stage.started is not None
        with self.mutex:
            stage.state = state
            stage.seconds = round((datetime.now(UTC) - stage.started).total_seconds(), 3)
            if state == "done":
                stage.work = None

    def heard(self, name: str, event: events.Event) -> None:
        """Note an event of stage `name`. A stage that trains is counted by the steps in its metrics files, on
        every executor; its progress bars are ignored."""
        with self.mutex:
            stage = next(stage for stage in self.status.stages if stage.name == name)
            if isinstance(event, events.Opened):
                if str(event.folder) not in stage.folders:
                    stage.folders.append(str(event.folder))
            elif isinstance(event, events.Training):
                self._train(stage, event)
            elif self.training is stage:
                return
            elif isinstance(event, events.Began):
                stage.work = WorkRecord(
                    description=event.description,
                    began=datetime.now(UTC),
                    initial=event.initial,
                    done=event.initial,
                    total=event.total,
                )
            elif isinstance(event, events.Items) and stage.work:
                stage.work.done += event.done
                stage.work.failed += event.failed
                stage.work.retried += event.retried
                stage.failed += event.failed
                stage.retried += event.retried

    def _train(self, stage: StageRecord, event: events.Training) -> None:
        steps = {model.name: steps_of(self.config, stage.name, model.name) for model in event.models}
        done = sum(steps[model.name] for model in event.models if model.done)
        if (current := event.current) and current.rows:
            done += int(current.rows[-1]["step"])
        if self.training is not stage:
            self.training, total = stage, sum(steps.values())
            began = datetime.now(UTC)
            stage.work = WorkRecord(description="", began=began, initial=done, done=done, total=total)
        work = stage.work
        assert work is not None
        name = current.folder.name.rpartition("-")[0] if current else "all models"
        work.description = f"steps of training {name}"
        # Steps after the checkpoint that a run resumes from are dropped from the file.
        work.initial, work.done = min(work.initial, done), done

    def _refresh_until_over(self) -> None:
        while not self.over.wait(REFRESH_S):
            self.write()
            for stage in self.status.stages:
                if stage.state == "running":
                    with logs.at(logs.WorkItem(stage=stage.name)):
                        events.tell(events.Tick())

    def write(self) -> None:
        """Write `status.json` if anything changed."""
        with self.mutex:
            text = self.status.model_dump_json(exclude={"updated"})
            if text == self.written:
                return
            self.status.updated = datetime.now(UTC)
            try:
                write_json(self.folder / STATUS, self.status.model_dump(mode="json"))
            except OSError as error:
                self._complain(error)
            else:
                self.written = text

    def _complain(self, error: OSError) -> None:
        if not self.complained:
            print(f"{self.folder} cannot be kept; the run goes on without: {error}", file=sys.stderr)
        self.complained = True


def how_it_ended(error: BaseException | None) -> tuple[State, str]:
    """A run's state, and one line for people."""
    if error is None:
        return "done", ""
    line = hide_credentials(next(iter(str(error).splitlines()), ""))
    if isinstance(error, Incomplete):
        return "incomplete", line
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, Terminated) or was_terminated()
        return "killed", "terminated (SIGTERM)" if terminated else "interrupted (Ctrl-C)"
    return "failed", f"{type(error).__name__}: {line}"


def steps_of(config: Config, stage: str, model: str) -> int:
    if stage == "pretrain":
        spec = config.target if model == "target" else config.drafter
        assert isinstance(spec, ScratchModel)
        return spec.pretrain.steps
    if stage == IMPROVE:
        assert config.improve is not None
        return config.improve.steps
    variant = next(variant for variant in config.train.drafters if variant.name == model)
    return config.train.steps_of(variant)


def prune(records: Path) -> None:
    """Keep the newest records and those of runs that are alive; remove the others."""
    old = sorted(records.iterdir(), key=lambda folder: folder.name.rsplit("-", 2)[-2:])[:-KEPT]
    for folder in old:
        if not lives(folder):
            shutil.rmtree(folder, ignore_errors=True)


def lives(folder: Path) -> bool:
    """Whether a driver holds this record. A lock of another user's run cannot be tried and counts as held."""
    if not (folder / ALIVE).exists():
        return False
    try:
        with FileLock(folder / ALIVE, timeout=0):
            return False
    except (Timeout, PermissionError):
        return True
