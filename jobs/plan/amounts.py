"""The amounts of a run: tokens, prompts, rows, and the bytes that it writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.plan.facts import Facts
from jobs.stages.teach import label_bytes, taught
from jobs.stages.train import drafters, scratch_models
from pipeline.config.models import Head, Role
from pipeline.config.schema import Config
from pipeline.models.shape import Shape
from pipeline.plan.peaks import FP32
from pipeline.store.artifacts import Artifact
from pipeline.sweep.counts import SweepCounts

GB = 1e9
# Copies on disk of a trained model's fp32 weights: the model itself, and two checkpoints of weights and two
# moments each, which stay until all models of the stage are trained.
TRAINED_COPIES = 1 + 3 * 2
MODEL_HOW = "estimate: 4 B a parameter, 12 B in each of two checkpoints while it trains"
ROW_BYTES = 1000  # one row of the sweep
FEATURES = 3  # layers whose inputs a head reads, unless it names others


class Amount(NamedTuple):
    """A figure of the table: `how` says exact, at most, or what it is estimated from."""

    name: str
    value: float
    unit: str
    how: str


class OnDisk(NamedTuple):
    """Bytes that will be written in all, and how many of them are not there yet."""

    amount: Amount
    left: float


def amounts(config: Config, facts: Facts, counts: SweepCounts, disk: Sequence[OnDisk]) -> Iterator[Amount]:
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
    yield from (file.amount for file in disk)
    names = ("cells", "rows of replay", "rows measured", "rows measured again", "timed runs")
    for name, count, how in zip(names, counts, ("at most", rows, timed, timed, timed), strict=True):
        yield Amount(name, count, "", how)


def on_disk(
    config: Config, shapes: Mapping[Role, Shape], facts: Facts, counts: SweepCounts
) -> Iterator[OnDisk]:
    """Labels without their headers, models, checkpoints of the models that are trained, and the sweep's rows.

    All of the sweep's rows count as not written yet.
    """
    folders: dict[str, Artifact] = {}
    if facts.prepared is not None:  # else the folders of later stages are not known yet
        scratch, _ = scratch_models(config, facts.prepared)
        teach, _ = taught(config, facts.prepared, scratch)
        trained, _ = drafters(config, teach, scratch)
        folders = {"labels": teach, **{f"scratch {role}": made for role, made in scratch.items()}}
        folders |= {f"drafter {name}": made for name, made in trained.items()}

    def written(name: str, sizes: Mapping[str, int], how: str) -> OnDisk:
        todo = sum(left(size, folders.get(folder)) for folder, size in sizes.items())
        return OnDisk(Amount(f"{name} on disk", sum(sizes.values()), "B", how), todo)

    def model(role: Role, steps: int) -> int:
        shape = shapes[role]
        return FP32 * (shape.frozen + shape.trained * (TRAINED_COPIES if steps else 1))

    stored = isinstance(config.drafter, Head) and config.labels.features != "recomputed"
    layers = len(getattr(config.drafter, "feature_layers", None) or ()) or FEATURES
    features = layers * shapes["target"].hidden if stored else 0
    labels = label_bytes(config, facts.labelled, facts.answers, facts.vocab, features)
    yield written("labels", {"labels": labels}, facts.how)
    for role, spec in config.scratch.items():
        yield written(f"scratch {role}", {f"scratch {role}": model(role, spec.pretrain.steps)}, MODEL_HOW)
    sizes = {
        f"drafter {variant.name}": model("drafter", config.train.steps_of(variant))
        for variant in config.train.drafters
    }
    yield written("drafters", sizes, MODEL_HOW)
    rows = counts.replayed + counts.measured + counts.rechecked
    yield written("rows", {"rows": ROW_BYTES * rows}, f"estimate: {ROW_BYTES} B a row")


def left(size: int, folder: Artifact | None) -> int:
    """How many of `size` bytes a stage has not written to its folder yet."""
    if folder is None or not folder.path.exists():
        return size
    there = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    return 0 if folder.complete else max(size - there, 0)


def disk_problems(config: Config, files: Sequence[OnDisk]) -> Iterator[str]:
    """One line if the bytes that are still to be written do not fit in the storage folder."""
    folder = Path(config.storage)
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(file.left for file in files), shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"labels, models, checkpoints and rows need {needed / GB:.1f} GB more, and {free / GB:.1f} GB "
            f"are free in {folder}: lower labels.max_sequences or labels.top_k, or set storage"
        )
