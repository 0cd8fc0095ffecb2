"""Training as its metrics files show it, wherever it runs: one thread reads them and tells what they hold."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import BadData
from pipeline.observe import logs
from pipeline.observe.events import ModelInTraining, Training, tell

POLL_S = 2.0
log = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a torn last line, left by a kill, is ignored.

    Raises:
        BadData: if another line is no JSON object of numbers with an integer `step`.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [numbers_of(json.loads(line)) for line in lines[:-1]]
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is damaged ({error}): delete {path.parent} and run again") from None


def numbers_of(row: Any) -> dict[str, float]:
    """A row of a metrics file; raises ValueError for any other JSON."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("a line is no object with an integer `step`")
    if wrong := [name for name, value in row.items() if type(value) not in (int, float)]:
        raise ValueError(f"{wrong[0]} is no number")
    return row


@contextmanager
def follow(files: Mapping[str, Path]) -> Iterator[None]:
    """Tell of the models that are trained in the body: at its beginning, every two seconds, and at its end.

    Args:
        files: model name → its `metrics.jsonl`, which need not exist yet, in the order of training.
    """
    here, over = logs.here(), threading.Event()

    def poll() -> None:
        with logs.at(here):
            while not over.wait(POLL_S):
                look(files)

    look(files)
    thread = threading.Thread(target=poll, name="training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look(files)


def look(files: Mapping[str, Path]) -> None:
    """Read the files and tell of them, or log why they cannot be read at present."""
    try:
        models = [
            ModelInTraining(name, file.parent, read_metrics(file), (file.parent / "model").exists())
            for name, file in files.items()
        ]
    except (OSError, ValueError) as error:  # ValueError: a line that another machine is writing
        log.info("the metrics of training cannot be read at present: %s", error)
    else:
        tell(Training(models))
