"""Hands writes to MLflow one after another in a thread of its own, and tries each again until it is taken.

Writes are made to be repeated: if an answer is lost on its way, the server may or may not have written.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import hide_credentials
from pipeline.observe.progress import progress

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
SILENT_S = 2.0  # a wait at the end that is shorter than this is not worth a line
# HTTP codes that say nothing about the write: a login that lapsed, a server that is slow or overloaded.
PASSING = (401, 403, 408, 429)


class Refused(Exception):
    """This write will never be taken, however often it is tried."""


@dataclass(frozen=True)
class Write:
    what: str  # for messages
    action: Callable[[], object]
    repeatable: bool  # the same command does it again where it is missing


class Writer:
    """A queue of writes and the thread that works it off in order. Only that thread talks to MLflow."""

    def __init__(self) -> None:
        self.problem = ""  # why the write that is tried at present was not taken yet
        self._changed = threading.Condition()
        self._waiting: deque[Write] = deque()
        self._current: Write | None = None
        self._succeeded = time.monotonic()
        self._given_up = threading.Event()
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    @property
    def left(self) -> int:
        """Writes that MLflow has not taken yet."""
        return len(self._waiting) + (self._current is not None)

    def put(self, what: str, action: Callable[[], object], repeatable: bool = False) -> None:
        """Queue a write; returns at once. `repeatable`: the same command does it again if it is missing."""
        with self._changed:
            self._waiting.append(Write(what, action, repeatable))
            self._changed.notify_all()

    def drop_repeatable(self) -> None:
        """Forget what the same command would write again, so that the rest gets through quickly."""
        with self._changed:
            self._waiting = deque(write for write in self._waiting if not write.repeatable)

    def finish(self, quiet_s: float, most_s: float = math.inf) -> int:
        """Wait for the writes that are left, with a bar; returns how many were given up in the end.

        Args:
            quiet_s: seconds without any write taken, counted from now, after which to give up.
            most_s: seconds after which to give up in any case.
        """
        began = time.monotonic()

        def deadline() -> float:
            return min(began + most_s, max(began, self._succeeded) + quiet_s)

        with self._changed:
            self._changed.wait_for(lambda: not self.left, min(SILENT_S, deadline() - began))
            if self.left and time.monotonic() < deadline():
                with progress(self.left, "mlflow") as bar:
                    while self.left and time.monotonic() < deadline():
                        before = self.left
                        self._changed.wait(0.5)
                        bar.update(before - self.left)
            self._given_up.set()  # or all is done: ends the thread either way
            self._changed.notify_all()
            return self.left

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._given_up.is_set())
                if self._given_up.is_set():
                    return
                self._current = write = self._waiting.popleft()
            if self._persist(write):
                with self._changed:
                    self._current, self._succeeded = None, time.monotonic()
                    self._changed.notify_all()

    def _persist(self, write: Write) -> bool:
        """Whether the write was answered, by yes or by a final no; false once all is given up."""
        pause = FIRST_PAUSE_S
        while not self._given_up.is_set():
            try:
                write.action()
            except Exception as error:  # stores of artifacts raise whatever their libraries raise
                why = hide_credentials(f"{type(error).__name__}: {error}")
                if is_final(error):
                    log.warning("MLflow refuses %s, which is not written: %s", write.what, why)
                    return True
                if not self.problem:
                    log.warning("MLflow did not take %s; it is tried again meanwhile: %s", write.what, why)
                self.problem = why
            else:
                if self.problem:
                    log.info("MLflow takes writes again; %d are left", self.left - 1)
                self.problem = ""
                return True
            self._given_up.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        return False


def is_final(error: Exception) -> bool:
    """Whether trying again is no use: the server refused what it was asked for, or a file is gone."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, Refused | FileNotFoundError):
        return True
    if isinstance(error, MlflowException):
        # A proxy without its server answers 404 as well, but not about a run.
        status = 0 if error.error_code == "ENDPOINT_NOT_FOUND" else error.get_http_status_code()
    else:
        status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in PASSING
