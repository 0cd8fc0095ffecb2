"""What a run tells about itself while it works, and who listens: its record, MLflow's curves, Ray's metrics.

Code that works calls `tell`. Outside a run nobody listens, and a listener returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.observe import logs


@dataclass(frozen=True)
class Began:
    """A stage begins with some work of `total` items, `initial` of which were done before."""

    description: str
    total: int
    initial: int


@dataclass(frozen=True)
class Items:
    """How many more items are done, failed for good, or are tried once more."""

    done: int = 0
    failed: int = 0
    retried: int = 0


@dataclass(frozen=True)
class Opened:
    """A stage reads or writes this artifact."""

    folder: Path


@dataclass(frozen=True)
class ModelInTraining:
    """A model of a launch: the rows of its `metrics.jsonl` so far, and whether its weights are written."""

    name: str
    folder: Path
    rows: Sequence[Mapping[str, float]]
    done: bool


@dataclass(frozen=True)
class Training:
    """The models of a launch, in the order in which they are trained; told every two seconds."""

    models: Sequence[ModelInTraining]

    @property
    def current(self) -> ModelInTraining | None:
        """The model that is trained at present; None when all are trained."""
        return next((model for model in self.models if not model.done), None)


@dataclass(frozen=True)
class Tick:
    """The stage still runs; told every second."""


@dataclass(frozen=True)
class Evaluated:
    """What one task of a sweep gave.

    Args:
        rows: lines that were written, or found from an earlier run.
        cells: how many of them are a cell on one prompt.
        failed: cells that ended in an error; `retried` of them and of `cells` had failed in an earlier run.
        accepted: of each (drafter, data set), without controls, accepted and proposed draft tokens.
        tokens: that were decoded on the clock, in `seconds`.
    """

    rows: int = 0
    cells: int = 0
    failed: int = 0
    retried: int = 0
    accepted: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0


Event = Began | Items | Opened | Training | Tick | Evaluated
Listener = Callable[[str, Event], None]  # takes the stage too
_listeners: list[Listener] = []


def tell(event: Event) -> None:
    """Hand an event to all listeners; outside a stage, as for tracking in its own thread, it is dropped."""
    stage = logs.here().stage
    if stage is not None:
        for listener in _listeners:
            listener(stage, event)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
