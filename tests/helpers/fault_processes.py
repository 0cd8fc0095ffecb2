"""The processes of a toy run on Ray, for tests that break them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from pipeline.observe.training import read_metrics
from pipeline.store.layout import METRICS
from tests.helpers.fault_toy import artifact, wait_until

FIRST = "drafter-full_only"  # trained before multi_view, in the same launch


def workers(above: subprocess.Popen[str] | psutil.Process, doing: str) -> list[psutil.Process]:
    """Ray's worker processes below a driver or raylet whose title says that they do this."""
    found = []
    for process in psutil.Process(above.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{doing}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def evaluator_at_work(storage: Path, driver: subprocess.Popen[str]) -> psutil.Process:
    """An evaluator at work, once the first of two slices of prompts is written."""
    wait_until(lambda: (s := artifact(storage, "sweep")) and list(s.glob("rows/*.jsonl")), driver, "rows")
    found: psutil.Process = wait_until(lambda: workers(driver, "Worker.call"), driver, "an evaluator")[0]
    return found


def training_workers(driver: int) -> list[psutil.Process]:
    """Ray Train's workers among all that the driver has started, and what these have started."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def logged(storage: Path, step: int) -> Callable[[], bool]:
    """Whether the first drafter has come to a step."""

    def ready() -> bool:
        folder = artifact(storage, FIRST)
        return bool(folder and (rows := read_metrics(folder / METRICS)) and rows[-1]["step"] >= step)

    return ready
