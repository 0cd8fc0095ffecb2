"""Structured logs: JSON lines that say stage, item of work and attempt, in the folder of a run's record.

The driver writes `log.jsonl`, each other process of the run `worker-<host>-<pid>.jsonl` beside it. Workers
find the folder by an environment variable. A log that cannot be written, on a full disk, ends nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import hide_credentials

RECORD = "BUDGETDRAFT_RECORD"  # in the environment: the folder of the run's record
LOG = "log.jsonl"
PACKAGES = ("jobs", "pipeline", "kernels")


@dataclass(frozen=True)
class WorkItem:
    """What is being worked on: an item is called by the file that it makes or reads."""

    stage: str | None = None
    item: str | None = None
    attempt: int | None = None


_work_item: ContextVar[WorkItem | None] = ContextVar("work item", default=None)


def here() -> WorkItem:
    return _work_item.get() or WorkItem()


@contextmanager
def at(work: WorkItem) -> Iterator[None]:
    token = _work_item.set(work)
    try:
        yield
    finally:
        _work_item.reset(token)


class JsonLines(logging.Handler):
    """Appends to one file. Every process has its own file, so that lines of several do not mix."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.who = {"host": socket.gethostname(), "pid": os.getpid()}
        self.complained = False

    def emit(self, record: logging.LogRecord) -> None:
        # Formatted, so that a traceback is part of the message.
        self.write(record.levelname, record.name, self.format(record))

    def write(self, level: str, logger: str, message: str, **more: Any) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "logger": logger,
            "message": hide_credentials(message),
            **asdict(here()),
            **self.who,
            **more,
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            if not self.complained:
                print(f"{self.path} cannot be written; the run goes on without: {error}", file=sys.stderr)
            self.complained = True


_log: JsonLines | None = None  # of this process


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """What the driver logs also goes to log.jsonl; workers that start meanwhile write beside it."""
    global _log
    _log = handler = _attach(folder / LOG)
    os.environ[RECORD] = str(folder)
    try:
        yield
    finally:
        del os.environ[RECORD]
        logging.getLogger().removeHandler(handler)
        _log = None


def _attach(path: Path) -> JsonLines:
    handler = JsonLines(path)
    logging.getLogger().addHandler(handler)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    return handler


def process_log() -> JsonLines | None:
    """The log of this process; None outside a run. A worker's log is opened on first use."""
    global _log
    folder = os.environ.get(RECORD)
    if _log is None and folder:
        if not logging.getLogger().handlers:  # or warnings would no longer reach the worker's stderr
            stderr = logging.StreamHandler()
            stderr.setLevel(logging.WARNING)
            logging.getLogger().addHandler(stderr)
        _log = _attach(Path(folder) / f"worker-{socket.gethostname()}-{os.getpid()}.jsonl")
    return _log


@contextmanager
def item(work: WorkItem) -> Iterator[None]:
    """Log that an item is begun, and done or failed; lines that the body logs name the item too."""
    log = process_log()
    with at(work):
        if log is None:
            yield
            return
        began = time.monotonic()
        log.write("INFO", __name__, "begun")
        try:
            yield
        except Exception as error:
            text = hide_credentials(str(error))
            log.write("ERROR", __name__, "failed", error=type(error).__name__, text=text)
            raise
        log.write("INFO", __name__, "done", seconds=round(time.monotonic() - began, 3))


def times_begun(stage: str, name: str) -> int:
    """How often any process has begun an item in this run so far; used where nobody counts attempts."""
    folder = os.environ.get(RECORD)
    count = 0
    for file in Path(folder).glob("*.jsonl") if folder else ():
        for line in read_lines(file):
            begun = line["logger"] == __name__ and line["message"] == "begun"
            count += begun and (line["stage"], line["item"]) == (stage, name)
    return count


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; what a full disk or a kill has torn is left out."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                continue


def name_of(item: object) -> str:
    """The name of an item among others: the file that it makes or reads; of several, the first."""
    for part in item if isinstance(item, tuple) else (item,):
        for attribute in ("output", "key", "name", "file"):
            value = getattr(part, attribute, None)
            if isinstance(value, str | Path):
                return Path(value).name
    return str(item)[:80]
