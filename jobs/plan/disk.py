"""What a run will write, what of it is there already, and whether the rest fits."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.plan.facts import Facts
from jobs.stages.teach import taught
from jobs.stages.train import drafters, scratch_models
from pipeline.config.models import AnyModel, ScratchModel
from pipeline.config.schema import Config
from pipeline.plan.shapes import FP32, Shape
from pipeline.plan.sweep_counts import SweepCounts
from pipeline.store.artifacts import Artifact
from pipeline.train.teacher import smallest_uint

GB = 1e9
# Of a trained model's fp32 weights: itself, and with two moments in its newest checkpoints, which stay until
# all models of the stage are trained.
TRAINED_COPIES = 1 + 3 * 2
ROW_BYTES = 1000  # of a row of the sweep


@dataclass(frozen=True)
class Amount:
    """A figure of the table: `how` says exact, at most, or what it is estimated from."""

    name: str
    value: float
    unit: str
    how: str


@dataclass(frozen=True)
class OnDisk:
    """Bytes that will be written in all, and how many of them are not there yet."""

    amount: Amount
    left: float


def on_disk(
    config: Config, shapes: Mapping[str, Shape], facts: Facts, counts: SweepCounts
) -> Iterator[OnDisk]:
    """Labels, headers aside; models and, of those that are trained, the checkpoints that stay meanwhile; and
    the sweep's rows, of which all are taken to be left.
    """
    labels, models, trained = folders(config, facts)
    entry = np.dtype(smallest_uint(facts.vocab)).itemsize
    per_token = 2 * entry + min(config.labels.top_k, facts.vocab) * (entry + 2)
    size = facts.labelled * config.data.sequence_tokens * per_token
    yield OnDisk(Amount("labels on disk", size, "B", facts.how), left(size, labels))
    how = "estimate: 4 B a parameter, 12 B in each of two checkpoints while it trains"
    for role, shape in shapes.items():
        spec: AnyModel = getattr(config, role)
        if isinstance(spec, ScratchModel):
            size = FP32 * shape.parameters * (TRAINED_COPIES if spec.pretrain.steps else 1)
            yield OnDisk(Amount(f"scratch {role} on disk", size, "B", how), left(size, models.get(role)))
    train, missing, total = config.train, 0.0, 0.0
    for drafter in train.drafters:
        own = train.steps if drafter.steps is None else drafter.steps
        size = FP32 * shapes["drafter"].parameters * (TRAINED_COPIES if own else 1)
        total, missing = total + size, missing + left(size, trained.get(drafter.name))
    yield OnDisk(Amount("drafters on disk", total, "B", how), missing)
    size = ROW_BYTES * (counts.replayed + counts.measured + counts.rechecked)
    yield OnDisk(Amount("rows on disk", size, "B", f"estimate: {ROW_BYTES} B a row"), size)


def folders(
    config: Config, facts: Facts
) -> tuple[Artifact | None, Mapping[str, Artifact], Mapping[str, Artifact]]:
    """Of labels, scratch models by role and drafters by name; nothing is known before stage prepare."""
    if facts.prepared is None:
        return None, {}, {}
    models, _ = scratch_models(config, facts.prepared)
    labels, _ = taught(config, facts.prepared, models)
    trained, _ = drafters(config, labels, models)
    return labels, models, trained


def left(size: float, folder: Artifact | None) -> float:
    """Of so many bytes, those that a stage has not written yet."""
    if folder is None or not folder.path.exists():
        return size
    if folder.complete:
        return 0.0
    there = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    return max(size - there, 0.0)


def disk_problems(config: Config, files: Sequence[OnDisk]) -> Iterator[str]:
    """A line where what is still to be written does not fit in the storage folder."""
    folder = Path(config.storage)
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(file.left for file in files), shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"labels, models, checkpoints and rows need {needed / GB:.1f} GB more, and {free / GB:.1f} GB "
            f"are free in {folder}: lower labels.max_sequences or labels.top_k, or set storage"
        )
