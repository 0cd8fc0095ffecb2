"""budgetdraft status: what a run has done, does, and failed at, and how long it will take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.records.record import RECORDS, STATUS, RunStatus, StageRecord, lives
from pipeline.errors import BadData
from pipeline.observe.logs import LOG
from pipeline.store.files import read_all
from pipeline.store.layout import FAILED
from pipeline.store.rows import FailedCell

SHOWN = 5  # failed cells
WIDTH = 110
AGAIN = "the same command resumes"


def show_status(storage: Path, run: str | None, as_json: bool) -> str:
    """What `budgetdraft status` prints: one screen, or one JSON document.

    Args:
        run: a record's name or the beginning of it, a config's name, or a record's path; None is the newest.

    Raises:
        BadData: if there is no such run.
    """
    view = View.of(*find(storage, run))
    return json.dumps(view.as_json(), indent=2, ensure_ascii=False) if as_json else "\n".join(view.lines())


def find(storage: Path, run: str | None) -> tuple[Path, RunStatus]:
    """The newest record that `run` can mean."""
    # With `os.path`, to which a name that no file can have is no file.
    if run is not None and os.path.isfile(file := Path(run) / STATUS if os.path.isdir(run) else Path(run)):
        return file.parent, read(file)
    records = read_records(storage / RECORDS)
    if not records:
        raise BadData(f"no run is recorded in {storage}: name the storage folder with --storage")
    if run is None:
        return records[-1]
    for fits in (
        [record for record in records if record[0].name == run],
        [record for record in records if record[1].name == run],
        [record for record in records if record[0].name.startswith(run)],
    ):
        if fits:
            return fits[-1]
    names = ", ".join(folder.name for folder, _ in records[-SHOWN:])
    raise BadData(f"no run {run!r} is recorded in {storage}; the newest are {names}")


def read_records(records: Path) -> list[tuple[Path, RunStatus]]:
    """All records of a storage, the newest last."""
    runs = [(file.parent, read(file)) for file in records.glob(f"*/{STATUS}")]
    return sorted(runs, key=lambda record: record[1].started)


def read(file: Path) -> RunStatus:
    try:
        return RunStatus.model_validate_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadData(f"{file} is not the record of a run: {error}") from None


@dataclass(frozen=True)
class View:
    """The record of a run, with what else is known at this moment."""

    folder: Path
    status: RunStatus
    died: bool  # the record says that the run is running, but no process holds its lock
    now: datetime
    earlier: Sequence[RunStatus]  # of the same config, the newest last

    @staticmethod
    def of(folder: Path, status: RunStatus) -> View:
        died = status.state == "running" and not lives(folder)
        if died:  # unless it ended after its status was read: so read it again
            status = read(folder / STATUS)
            died = status.state == "running"
        others = [other for path, other in read_records(folder.parent) if path != folder]
        same = [other for other in others if other.config_fingerprint == status.config_fingerprint]
        return View(folder, status, died, datetime.now(UTC), same)

    @property
    def state(self) -> str:
        return "died" if self.died else self.status.state

    def seconds_left(self, stage: StageRecord) -> float | None:
        """Time left for a stage's present work at its rate so far; None if none of it is done yet."""
        work = stage.work
        if self.state != "running" or work is None or work.done <= work.initial:
            return None
        elapsed = (self.now - work.began).total_seconds()
        return elapsed / (work.done - work.initial) * max(0, work.total - work.done)

    def seconds_before(self, stage: StageRecord) -> float | None:
        """How long a stage took in the newest earlier run of this config in which it was not cached."""
        for status in reversed(self.earlier):
            for earlier in status.stages:
                if earlier.name == stage.name and earlier.state == "done" and not earlier.cached:
                    return earlier.seconds
        return None

    @property
    def waiting(self) -> list[StageRecord]:
        return [stage for stage in self.status.stages if stage.state == "waiting"]

    @cached_property
    def failed_cells(self) -> list[FailedCell]:
        sweep = next((stage for stage in self.status.stages if stage.name == "sweep"), None)
        return [
            row
            for path in (sweep.folders if sweep else ())
            for row in read_all(Path(path) / FAILED, FailedCell)
        ]

    def as_json(self) -> dict[str, Any]:
        """The record, and what `lines` adds to it. Times are in seconds."""
        left = {stage.name: self.seconds_left(stage) for stage in self.status.stages}
        return {
            "record": str(self.folder),
            **self.status.model_dump(mode="json"),
            "state": self.state,
            "work_left_s": next((seconds for seconds in left.values() if seconds is not None), None),
            "waiting": {stage.name: self.seconds_before(stage) for stage in self.waiting},
            "failed_cells": len(self.failed_cells),
            "first_failed_cells": [row.model_dump(mode="json") for row in self.failed_cells[:SHOWN]],
        }

    def lines(self) -> Iterator[str]:
        """One screen for people."""
        status = self.status
        yield f"run    {self.folder.name}"
        yield f"state  {self.describe_state()}"
        for stage in status.stages:
            if stage.state != "waiting":
                yield cut(f"  {stage.name:<9}{self.describe(stage)}")
        if self.waiting and self.state == "running":
            yield cut(f"  after that: {', '.join(map(self.describe_waiting, self.waiting))}")
        elif self.waiting:
            yield f"  not begun: {', '.join(stage.name for stage in self.waiting)}"
        if self.failed_cells:
            yield f"failed cells  {len(self.failed_cells)}; the first of them:"
            for row in self.failed_cells[:SHOWN]:
                cell = row.cell
                yield cut(
                    f"  {cell.drafter}, {cell.dataset}, {cell.context}, {cell.policy}, B = {cell.budget}, "
                    f"{f'γ = {cell.gamma}' if cell.gamma else 'every γ'}: {row.error.splitlines()[0]}"
                )
        yield f"logs   {self.folder / LOG}, worker-*.jsonl beside it"

    def describe_state(self) -> str:
        status = self.status
        began = f"began {span((self.now - status.started).total_seconds())} ago"
        seen = span((self.now - status.updated).total_seconds())
        process = f"process {status.pid} on {status.host}"
        if self.died:
            return f"died: {process} is gone without a word, last seen {seen} ago; {AGAIN}"
        if status.state == "running":
            return f"running: {process}, {began}, last change {seen} ago"
        took = f"took {span((status.updated - status.started).total_seconds())}, ended {seen} ago"
        if status.state == "done":
            return f"done: {took}"
        return cut(f"{status.state}: {took}; {AGAIN}; {status.ended}")

    def describe(self, stage: StageRecord) -> str:
        """A stage that has begun."""
        state = "died" if self.died and stage.state == "running" else stage.state
        seconds = stage.seconds
        if seconds is None and stage.started and state == "running":
            seconds = (self.now - stage.started).total_seconds()
        parts: list[str] = ["cached" if stage.cached else state]
        if seconds is not None and not stage.cached:
            parts.append(span(seconds))
        if work := stage.work:
            parts.append(f"{work.description}: {work.done} of {work.total}")
        parts += [
            f"{count} {what}"
            for what, count in (("failed", stage.failed), ("retried", stage.retried))
            if count
        ]
        if (left := self.seconds_left(stage)) is not None:
            parts.append(f"about {span(left)} left of this")
        return ", ".join(parts)

    def describe_waiting(self, stage: StageRecord) -> str:
        before = self.seconds_before(stage)
        return stage.name if before is None else f"{stage.name} (took {span(before)} in an earlier run)"


def cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def span(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
