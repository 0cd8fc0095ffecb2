"""The amounts of a run: tokens, prompts, rows, and the bytes that it writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from jobs.plan.facts import Facts
from jobs.stages.pipeline import folders
from jobs.stages.teach import label_bytes
from jobs.stages.train import model_bytes
from pipeline.config.models import Role
from pipeline.config.schema import Config
from pipeline.models.shape import Shape
from pipeline.store.artifacts import Artifact
from pipeline.sweep.counts import SweepCounts

GB = 1e9
MODEL_HOW = "estimate: 4 B a parameter, 12 B in each of two checkpoints while it trains"
ROW_BYTES = 1000  # one row of the sweep


class Amount(NamedTuple):
    """A figure of the table: `how` says exact, at most, or what it is estimated from."""

    name: str
    value: float
    unit: str
    how: str


def amounts(config: Config, facts: Facts, counts: SweepCounts, disk: Iterable[Amount]) -> Iterator[Amount]:
    rows = "estimate: of these prompts" if facts.prompts_how.startswith("estimate") else "at most"
    timed = "estimate: the named cells, and as many as predictions can point at"
    timed = timed if config.sweep.predicts else rows
    yield Amount("training sequences", facts.sequences, "", facts.how)
    yield Amount("training tokens", facts.sequences * config.data.sequence_tokens, "", facts.how)
    yield Amount("labelled sequences", facts.labelled, "", facts.how)
    if config.data.asks:
        yield Amount("answers to learn from", facts.answers, "", facts.how)
    for place, count in sorted(facts.prompts.items()):
        yield Amount(f"prompts {place.dataset}-{place.context}", count, "", facts.prompts_how)
    yield from disk
    names = ("cells", "rows of replay", "rows measured", "rows measured again", "timed runs")
    for name, count, how in zip(names, counts, ("at most", rows, timed, timed, timed), strict=True):
        yield Amount(name, count, "", how)


def on_disk(
    config: Config, shapes: Mapping[Role, Shape], facts: Facts, counts: SweepCounts
) -> Iterator[tuple[Amount, int]]:
    """Labels without their headers, models, checkpoints of the models that are trained, and the sweep's rows.

    Each with the bytes that are not written yet; of the rows those are all.
    """
    # Before stage prepare the folders of later stages are not known yet.
    scratch, teach, trained = folders(config, facts.prepared) if facts.prepared else ({}, None, {})

    def written(name: str, how: str, *parts: tuple[int, Artifact | None]) -> tuple[Amount, int]:
        missing = sum(folder.missing(size) if folder else size for size, folder in parts)
        return Amount(f"{name} on disk", sum(size for size, _ in parts), "B", how), missing

    texts = facts.labelled, facts.answers
    labels = label_bytes(config, *texts, facts.vocab, shapes["drafter"].features)
    yield written("labels", facts.how, (labels, teach))
    for role, spec in config.scratch.items():
        size = model_bytes(shapes[role], spec.pretrain.steps)
        yield written(f"scratch {role}", MODEL_HOW, (size, scratch.get(role)))
    sizes = {v.name: model_bytes(shapes["drafter"], config.train.steps_of(v)) for v in config.train.drafters}
    yield written("drafters", MODEL_HOW, *((size, trained.get(name)) for name, size in sizes.items()))
    rows = counts.replayed + counts.measured + counts.rechecked
    yield written("rows", f"estimate: {ROW_BYTES} B a row", (ROW_BYTES * rows, None))


def disk_problems(config: Config, needed: int) -> Iterator[str]:
    """One line if the bytes that are still to be written do not fit in the storage folder."""
    folder = Path(config.storage)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"labels, models, checkpoints and rows need {needed / GB:.1f} GB more, and {free / GB:.1f} GB "
            f"are free in {folder}: lower labels.max_sequences or labels.top_k, or set storage"
        )
