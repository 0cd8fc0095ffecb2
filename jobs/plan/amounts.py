"""What a run comes to: tokens, prompts, rows, and the bytes that it writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.plan.facts import Facts
from jobs.stages.teach import label_bytes, taught
from jobs.stages.train import drafters, scratch_models
from pipeline.config.models import ScratchModel
from pipeline.config.schema import Config
from pipeline.plan.shapes import FP32, Shape
from pipeline.plan.sweep_counts import SweepCounts
from pipeline.store.artifacts import Artifact

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


def of_data(config: Config, facts: Facts) -> Iterator[Amount]:
    yield Amount("training sequences", facts.sequences, "", facts.how)
    yield Amount("training tokens", facts.sequences * config.data.sequence_tokens, "", facts.how)
    yield Amount("labelled sequences", facts.labelled, "", facts.how)
    for place, count in sorted(facts.prompts.items()):
        yield Amount(f"prompts {place.dataset}-{place.context}", count, "", facts.prompts_how)


def of_sweep(config: Config, facts: Facts, counts: SweepCounts) -> Iterator[Amount]:
    how = "estimate: of these prompts" if facts.prompts_how.startswith("estimate") else "at most"
    yield Amount("cells", counts.cells, "", "at most")
    yield Amount("rows of replay", counts.replayed, "", how)
    if config.sweep.predicts:
        how = "estimate: the named cells, and as many as predictions can point at"
    yield Amount("rows measured", counts.measured, "", how)
    yield Amount("rows measured again", counts.rechecked, "", how)
    yield Amount("timed runs", counts.runs, "", how)


def on_disk(
    config: Config, shapes: Mapping[str, Shape], facts: Facts, counts: SweepCounts
) -> Iterator[OnDisk]:
    """Labels, headers aside; models and, of those that are trained, the checkpoints that stay meanwhile; and
    the sweep's rows, of which all are taken to be left.
    """
    folders: dict[str, Artifact] = {}
    if facts.prepared is not None:  # before that nothing is known of what later stages write
        scratch, _ = scratch_models(config, facts.prepared)
        labels, _ = taught(config, facts.prepared, scratch)
        trained, _ = drafters(config, labels, scratch)
        folders = {"labels": labels, **{f"scratch {role}": made for role, made in scratch.items()}}
        folders |= {f"drafter {name}": made for name, made in trained.items()}

    def written(name: str, size: float, how: str) -> OnDisk:
        return OnDisk(Amount(f"{name} on disk", size, "B", how), left(size, folders.get(name)))

    def model(role: str, steps: int) -> int:
        return FP32 * shapes[role].parameters * (TRAINED_COPIES if steps else 1)

    yield written("labels", label_bytes(config, facts.labelled, facts.vocab), facts.how)
    how = "estimate: 4 B a parameter, 12 B in each of two checkpoints while it trains"
    for role in shapes:
        if isinstance(spec := getattr(config, role), ScratchModel):
            yield written(f"scratch {role}", model(role, spec.pretrain.steps), how)
    sizes = {one.name: model("drafter", config.train.steps_of(one)) for one in config.train.drafters}
    files = [written(f"drafter {name}", size, how) for name, size in sizes.items()]
    total = Amount("drafters on disk", float(sum(sizes.values())), "B", how)
    yield OnDisk(total, sum(file.left for file in files))
    rows = counts.replayed + counts.measured + counts.rechecked
    yield written("rows", ROW_BYTES * rows, f"estimate: {ROW_BYTES} B a row")


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
