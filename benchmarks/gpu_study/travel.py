"""What travels to a GPU machine rented for an hour, and what comes back: artifacts without their bulk.

A light copy of an artifact leaves out what its destination does not read (documents, labels) and holds models
in the precision that they are evaluated in. Its manifest lists the files of the copy under the fingerprint of
the artifact, so that the pipeline finds it complete.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from jobs.records.record import RECORDS
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.store.artifacts import Artifact, seal
from pipeline.store.layout import MANIFEST

log = logging.getLogger(__name__)

PART = "study.tar.gz."
# For machines that give back few files, none above 16 MiB, 64 MiB in all; bench.json and a log come too.
PART_BYTES, MOST_BYTES = 15 * 2**20, 60 * 2**20
DOCUMENTS, MODEL = "documents", "model"


def light_copy(folder: Path, to: Path, left_out: Collection[str] = (), dtype: str = "float32") -> None:
    """Copy a complete artifact without the subfolders `left_out`; its model's weights become `dtype`.

    Raises:
        BadData: if the artifact is incomplete or damaged, or `to` exists.
    """
    artifact = Artifact(folder, folder.name, "")
    if not artifact.complete:
        raise BadData(f"{folder} is no finished stage: it has no {MANIFEST}")
    if bad := artifact.damaged():
        raise BadData(f"{folder} is damaged: {', '.join(bad[:5])}")
    if to.exists():
        raise BadData(f"{to} exists; name a new folder")
    manifest = artifact.manifest
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*left_out, ".*"))
    weights = to / MODEL / "model.safetensors"
    if weights.exists() and dtype != "float32":
        wanted: torch.dtype = getattr(torch, dtype)
        tensors = {name: tensor.to(wanted) for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        described = json.loads((to / MODEL / "config.json").read_text(encoding="utf-8"))
        text = json.dumps({**described, "dtype": dtype}, indent=2)
        (to / MODEL / "config.json").write_text(text + "\n", encoding="utf-8")
    (to / MANIFEST).unlink()
    seal(to, manifest)


def pack(config: Config, storage: Path, output: Path) -> list[Path]:
    """Light copies of a storage's complete artifacts, as parts of one archive; earlier parts are replaced.

    Prepared data stay behind, since they came from elsewhere. So do the labels, and the scratch drafter,
    which is the untrained variant. If the archive is too large, the target's weights stay behind too, with a
    warning in the log.

    Raises:
        BadData: if the archive is too large even without the target.
    """
    for target in (True, False):
        archive = io.BytesIO()
        with tempfile.TemporaryDirectory() as scratch:
            for folder, left_out, dtype in luggage(config, storage, target):
                light_copy(folder, Path(scratch) / folder.name, left_out, dtype)
            with tarfile.open(fileobj=archive, mode="w:gz", compresslevel=6) as tar:
                tar.add(scratch, arcname=".")
                if (storage / RECORDS).exists():
                    tar.add(storage / RECORDS, arcname=RECORDS)
        size = archive.tell()
        if size <= MOST_BYTES:
            break
        log.warning("%.1f MiB are too large%s", size / 2**20, ": the target stays behind" if target else "")
    else:
        raise BadData(
            f"what is to be packed has {size / 2**20:.1f} MiB, even without the target, and may have "
            f"{MOST_BYTES / 2**20:.0f}: sweep fewer budgets, γ or prompts, or train fewer drafters"
        )
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob(f"{PART}*"):
        old.unlink()
    archive.seek(0)
    made: list[Path] = []
    while piece := archive.read(PART_BYTES):
        made.append(output / f"{PART}{len(made):02d}")
        made[-1].write_bytes(piece)
    log.info("packed %.1f MiB into %d files in %s", size / 2**20, len(made), output)
    return made


def luggage(config: Config, storage: Path, target: bool) -> Iterator[tuple[Path, tuple[str, ...], str]]:
    """Complete artifacts, what is left out of each, and the precision of its model.

    Until all drafters are trained, stage teach is left out whole: training needs its labels, and the copy
    would not have them.
    """
    complete = {file.parent for file in storage.glob(f"*/{MANIFEST}")}
    stages = {folder: folder.name.rpartition("-")[0] for folder in sorted(complete)}
    trained = {f"drafter-{drafter.name}" for drafter in config.train.drafters} <= set(stages.values())
    for folder, stage in stages.items():
        if stage == "prepare" or (stage == "teach" and not trained):
            continue
        if stage == "teach":
            yield folder, ("labels",), "float32"
        elif stage == "pretrain-target":
            yield folder, () if target else (MODEL,), config.target.dtype
        elif stage == "pretrain-drafter":
            yield folder, (MODEL,), "float32"
        else:
            yield folder, (), config.drafter_dtype


def unpack(output: Path, storage: Path) -> None:
    """Put the artifacts that `pack` packed into a storage, except those that are complete there already.

    Raises:
        BadData: if there is no archive, a part is missing, or a file of it would lie outside the storage.
    """
    parts = sorted(output.glob(f"{PART}*"))
    if [part.name for part in parts] != [f"{PART}{number:02d}" for number in range(len(parts))] or not parts:
        raise BadData(f"{output} does not hold all of {PART}00, {PART}01, …: copy them again")
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    storage.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=storage) as scratch, tarfile.open(fileobj=whole) as tar:
            tar.extractall(scratch, filter="data")
            for folder in Path(scratch).iterdir():
                if folder.name == RECORDS:
                    shutil.copytree(folder, storage / RECORDS, dirs_exist_ok=True)
                elif not (storage / folder.name / MANIFEST).exists():
                    shutil.rmtree(storage / folder.name, ignore_errors=True)
                    folder.rename(storage / folder.name)
    except (tarfile.TarError, EOFError) as error:
        raise BadData(f"the archive in {output} is damaged ({error}): copy it again") from error
