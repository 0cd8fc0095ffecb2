"""A run's counts as Ray metrics: each machine of the cluster serves them to Prometheus with Ray's own.

The driver turns what it hears of its stages into metrics, so that they outlive the workers. They have few
tags: a sweep of 10,000 cells must not become 10,000 series.
"""

from __future__ import annotations

from collections import defaultdict

from ray.util.metrics import Counter, Gauge

from pipeline.observe.events import Evaluated, Event, Items, Tick, Training

PREFIX = "budgetdraft"
SPEED = "train/tokens_per_s"  # in a row of metrics.jsonl


def counter(name: str, what: str) -> Counter:
    return Counter(f"{PREFIX}_{name}", what, ("stage",))


class RayMetrics:
    """A listener to events, to be made once Ray runs."""

    def __init__(self) -> None:
        self.items = {
            "done": counter("items_done", "tasks that a stage has done"),
            "failed": counter("items_failed", "tasks that were given up: they killed their worker each time"),
            "retried": counter("items_retried", "tasks that were lost with their worker and tried again"),
        }
        self.cells = {
            "done": counter("cells_done", "cells of the sweep with a row, one for each prompt"),
            "failed": counter("cells_failed", "cells of the sweep that ended in an error"),
            "retried": counter("cells_retried", "cells of the sweep that an earlier run had left failed"),
        }
        self.acceptance = Gauge(
            f"{PREFIX}_acceptance",
            "accepted share of proposals over all cells of the sweep so far, without controls",
            ("drafter", "dataset"),
        )
        self.speed = Gauge(f"{PREFIX}_tokens_per_s", "tokens/s of training, of timed decoding", ("stage",))
        self.shown: dict[tuple[str, Gauge, tuple[tuple[str, str], ...]], float] = {}  # also by stage
        self.counts: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def __call__(self, stage: str, event: Event) -> None:
        tags = {"stage": stage}
        if isinstance(event, Items):
            add(self.items, {"done": event.done, "failed": event.failed, "retried": event.retried}, tags)
        elif isinstance(event, Training) and event.current:
            rows = reversed(event.current.rows)  # not every row has a speed
            if (speed := next((row[SPEED] for row in rows if SPEED in row), None)) is not None:
                self.show(stage, self.speed, tags, speed)
        elif isinstance(event, Tick):
            # Ray drops a gauge that was not set for two of its reports; those of past stages may go.
            for (of, gauge, labels), value in list(self.shown.items()):
                if of == stage:
                    gauge.set(value, dict(labels))
        elif isinstance(event, Evaluated):
            add(self.cells, {"done": event.cells, "failed": event.failed, "retried": event.retried}, tags)
            if event.seconds:
                self.show(stage, self.speed, tags, event.tokens / event.seconds)
            for key, (kept, proposed) in event.accepted.items():
                before = self.counts[key]
                accepted, total = self.counts[key] = before[0] + kept, before[1] + proposed
                if total:
                    named = {"drafter": key[0], "dataset": key[1]}
                    self.show(stage, self.acceptance, named, accepted / total)

    def show(self, stage: str, gauge: Gauge, tags: dict[str, str], value: float) -> None:
        gauge.set(value, tags)
        self.shown[stage, gauge, tuple(tags.items())] = value


def add(counters: dict[str, Counter], amounts: dict[str, int], tags: dict[str, str]) -> None:
    for name, amount in amounts.items():
        if amount:  # Ray refuses a 0
            counters[name].inc(amount, tags)
