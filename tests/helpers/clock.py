"""Limits in seconds that fit the machine, and waiting within them.

A limit is there so that what hangs comes to an end; no test asserts on seconds. Limits are written for a
machine whose unit is `REFERENCE_S`, and are stretched where the same work takes longer.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

UNIT = "BUDGETDRAFT_TESTS_UNIT_S"  # in the environment: measured by the first process of a session
REFERENCE_S = 0.2  # of one idle core of a server of 2023
TRIES = 3


def work() -> None:
    """What tests spend their time on: Python, and small products."""
    import torch

    product = torch.eye(64)
    for number in range(15_000):
        product = (product @ product).clamp(max=number + 1.0)


def measure() -> float:
    """Seconds of the work; the least of a few tries, as others use the machine too."""
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def unit() -> float:
    if UNIT not in os.environ:
        os.environ[UNIT] = f"{measure():.4f}"
    return float(os.environ[UNIT])


def patience(seconds: float) -> float:
    """As long as so many seconds are on the machine that limits are written for; never less."""
    return seconds * max(1.0, unit() / REFERENCE_S)


def wait_for(
    ready: Callable[[], Found],
    what: str,
    seconds: float = 60,
    process: subprocess.Popen[str] | subprocess.Popen[bytes] | None = None,
    told: Callable[[], str] = str,
) -> Found:
    """The first truthy value of `ready()`, within the machine's patience.

    Args:
        process: whose end before that is a failure.
        told: more to say in a failure, such as a log.
    """
    limit = patience(seconds)
    deadline = time.monotonic() + limit
    while not (found := ready()):
        ended = process is not None and process.poll() is not None
        assert not ended, f"the process ended with {process and process.returncode} before {what}: {told()}"
        assert time.monotonic() < deadline, f"{what} did not happen in {limit:.0f} s: {told()}"
        time.sleep(0.02)
    return found
