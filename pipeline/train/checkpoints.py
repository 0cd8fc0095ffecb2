"""Checkpoints that any engine and any number of workers can go on from.

`checkpoints/step-N/` holds the fp32 weights and AdamW's moments by parameter name, one safetensors file each,
and `complete.json`, which is written last and has the checksums. The newest two are kept: a damaged one is
removed, and training goes on from the one before. Where training asks for it, the best one is kept too.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.models.layers import trained_parameters
from pipeline.store.files import atomic_path, file_sha256, write_json
from pipeline.train.engine import PARTS, Engine, Part

CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
KEPT = 2

log = logging.getLogger(__name__)


class WrittenFile(BaseModel):
    bytes: int
    sha256: str


class Checkpoint(BaseModel):
    """What `complete.json` says.

    `step` counts finished steps, which are AdamW's updates too. `unlogged` are the losses of the steps since
    the last row of the log, so that a run that is stopped between two rows ends with the same rows.
    """

    step: int
    unlogged: list[dict[str, float]]
    files: dict[str, WrittenFile]


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted((file.parent for file in folder.glob(f"{CHECKPOINTS}/step-*/{COMPLETE}")), key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    checkpoints = complete(folder)
    return checkpoints[-1] if checkpoints else None


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def save(engine: Engine, folder: Path, step: int, unlogged: list[dict[str, float]], best: int = 0) -> None:
    """Write a checkpoint; it counts once its marker is there. Called by all workers; rank 0 writes.

    Args:
        best: the step of a checkpoint that stays beside the newest two.

    Raises:
        OSError: on rank 0, if the disk is full or failing; what was written of this checkpoint is removed.
    """
    parts = ((part, engine.part(part)) for part in PARTS)
    if engine.rank > 0:
        for _ in parts:  # gathering takes all workers
            pass
        return
    target = checkpoint_folder(folder, step)
    shutil.rmtree(target, ignore_errors=True)  # what a kill left
    try:
        write(target, step, unlogged, parts)
    except OSError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    kept = [*complete(folder)[-KEPT:], checkpoint_folder(folder, best)]
    for old in folder.glob(f"{CHECKPOINTS}/step-*"):
        if old not in kept:
            shutil.rmtree(old)


def write(
    target: Path, step: int, unlogged: list[dict[str, float]], parts: Iterable[tuple[Part, dict[str, Tensor]]]
) -> None:
    files = {}
    for part, tensors in parts:
        file = target / f"{part}.safetensors"
        with disk_errors(file), atomic_path(file) as temporary:
            save_file(tensors, temporary)
        files[file.name] = WrittenFile(bytes=file.stat().st_size, sha256=file_sha256(file))
    write_json(
        target / COMPLETE, Checkpoint(step=step, unlogged=unlogged, files=files).model_dump(mode="json")
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a SafetensorError that stands for an OSError into one: only its text has the number."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def resume(engine: Engine, folder: Path) -> Checkpoint:
    """Load the newest checkpoint that is whole; step 0 where there is none. Called by all workers.

    Rank 0 looks at the checksums, names and removes what is damaged, and tells the others.
    """
    step = engine.share(newest_whole(folder) if engine.rank == 0 else 0)
    if step == 0:
        return Checkpoint(step=0, unlogged=[], files={})
    checkpoint = checkpoint_folder(folder, step)
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(safe_open(checkpoint / f"{part}.safetensors", framework="pt"))
            for part in PARTS
        }
        engine.restore(step, lambda part, name: files[part].get_tensor(name))
    return read_marker(checkpoint)


def newest_whole(folder: Path) -> int:
    """The step of the newest checkpoint that is as it was written, or 0; damaged ones are removed."""
    for checkpoint in reversed(complete(folder)):
        problem = damage(checkpoint)
        if problem is None:
            return step_of(checkpoint)
        log.error("%s: this checkpoint is removed, and training goes on from the one before", problem)
        shutil.rmtree(checkpoint)
    return 0


def damage(checkpoint: Path) -> str | None:
    """The first file that is not as it was written, and how; None where all are."""
    try:
        marker = read_marker(checkpoint)
    except ValueError as error:
        return f"{checkpoint / COMPLETE} is damaged: {error}"
    if marker.step != step_of(checkpoint):
        return f"{checkpoint / COMPLETE} is damaged: it is of step {marker.step}"
    files = marker.files
    for name in (f"{part}.safetensors" for part in PARTS):
        file = checkpoint / name
        if name not in files or not file.exists():
            return f"{file} is missing"
        if file_sha256(file) != files[name].sha256:
            return f"{file} is damaged: its sha256 is not the one that {COMPLETE} has"
    return None


def read_marker(checkpoint: Path) -> Checkpoint:
    return Checkpoint.model_validate_json((checkpoint / COMPLETE).read_bytes())


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """The trained weights into a model of the same shape on the CPU."""
    with safe_open(checkpoint / "weights.safetensors", framework="pt") as file:
        for name, weight in trained_parameters(model):
            weight.copy_(file.get_tensor(name))
