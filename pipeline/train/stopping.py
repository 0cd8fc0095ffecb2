"""Leaving at a good place: Ctrl-C and SIGTERM wait until a step is done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Training was asked to stop; its checkpoint is written."""


@contextmanager
def signals_put_off() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM are noted and sent again at the end; yields whether one was noted.

    Only the first is put off: whoever asks twice does not want to wait. To be entered in the main thread, the
    only one that may handle signals.
    """
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        put_back()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: bool(noted)
    finally:
        put_back()
        if noted:
            signal.raise_signal(noted[0])
