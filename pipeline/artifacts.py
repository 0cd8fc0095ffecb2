"""Artifact folders: fingerprints, atomic writes, manifests, provenance, typed rows.

A stage writes into `<storage>/<stage>-<fingerprint>/`. The fingerprint covers the stage's config and the
fingerprints of its inputs, so the same work has the same folder. Every file appears by rename, and
`manifest.json` appears last: a folder with a manifest is complete and is reused, a folder without one is
resumed at the file where it stopped.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

MANIFEST = "manifest.json"
# Raised when the meaning of artifacts changes, so that old folders are not mistaken for new ones.
FORMAT = 1
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "ray",
    "deepspeed",
    "mlflow",
    "triton",
    "numpy",
)

RowT = TypeVar("RowT", bound=BaseModel)


def fingerprint(value: Any) -> str:
    """12 hex digits of a JSON-able value or pydantic model, independent of key order."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"cannot fingerprint a {type(item).__name__}")

    text = json.dumps(value, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: containers that share a storage have the same ones.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """One `.npy` file, to be read back as a memory map."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def write_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Typed rows as JSON lines."""
    write_text(path, "".join(row.model_dump_json() + "\n" for row in rows))


def read_rows(path: Path, row_type: type[RowT]) -> list[RowT]:
    with path.open(encoding="utf-8") as file:
        return [row_type.model_validate_json(line) for line in file]


def read_all(folder: Path, row_type: type[RowT]) -> list[RowT]:
    """The rows of all files of a folder."""
    return [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file, row_type)]


@cache
def provenance() -> dict[str, Any]:
    """Git commit and dirty flag of the code, versions of the libraries, and the machine."""
    code = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(code), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    status = git("status", "--porcelain")
    return {
        "git_sha": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }


@dataclass(frozen=True)
class Artifact:
    """One stage's folder, complete or half-made."""

    path: Path
    stage: str
    fingerprint: str

    @property
    def complete(self) -> bool:
        return (self.path / MANIFEST).exists()

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a complete artifact.

        Raises:
            ValueError: if it is missing or torn; the text names the file and what to do.
        """
        file = self.path / MANIFEST
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not complete: run the stage {self.stage!r} first") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}): delete it and run the stage again") from None

    def finish(self, inputs: dict[str, Any], counts: dict[str, Any], seconds: float) -> None:
        """Write the manifest: what went in, what came out, checksums of every file, provenance.

        `peak_memory_bytes` is the most that this process has held so far: of the stage itself where it ran
        inline and alone.
        """
        files = {
            str(file.relative_to(self.path)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(self.path.rglob("*"))
            if file.is_file() and not file.name.startswith(".") and file.name != MANIFEST
        }
        write_json(
            self.path / MANIFEST,
            {
                "stage": self.stage,
                "fingerprint": self.fingerprint,
                "format": FORMAT,
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(seconds, 3),
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "inputs": json.loads(json.dumps(inputs, default=lambda m: m.model_dump(mode="json"))),
                "counts": counts,
                "provenance": provenance(),
                "files": files,
            },
        )


def open_artifact(storage: Path, stage: str, inputs: dict[str, Any]) -> Artifact:
    """The artifact folder of a stage with these inputs; what is written first makes it.

    `inputs` holds all that the result depends on: config groups and fingerprints of earlier artifacts.
    """
    digest = fingerprint({"stage": stage, "format": FORMAT, "inputs": inputs})
    return Artifact(storage / f"{stage}-{digest}", stage, digest)
