"""Artifact folders: fingerprints, claims, manifests, and files that appear whole.

A stage writes into `<storage>/<stage>-<fingerprint>/`. The fingerprint covers the stage's config and the
fingerprints of its inputs, so the same work has the same folder. Every file appears by rename, and
`manifest.json` appears last: a folder with a manifest is complete and is reused, a folder without one is
resumed at the file where it stopped. A folder is worked on by one run at a time (`Artifact.claim`), and what
is reused is compared with its checksums first: what is damaged is removed and made again.
"""

from __future__ import annotations

import glob
import json
import logging
import shutil
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.hardware import peak_bytes
from pipeline.observe.events import Opened, tell
from pipeline.store.files import file_sha256, fingerprint, write_json
from pipeline.store.layout import MANIFEST, MODEL, TOKENIZER
from pipeline.store.provenance import provenance

log = logging.getLogger(__name__)

LOCKS = ".locks"
WHOLE = (TOKENIZER, MODEL)  # folders that are written as one
CHECKING_THREADS = 8  # hashing leaves the interpreter's lock alone
# Raised when artifacts change their meaning, or a config makes others than before, so that old folders are
# not mistaken for new ones.
FORMAT = 2


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
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not complete: run the stage {self.stage!r} first") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({error}): delete it and run the stage again") from None
        if not isinstance(manifest, dict):
            raise ValueError(f"{file} is damaged (no JSON object): delete it and run the stage again")
        return manifest

    def missing(self, size: int) -> int:
        """How many of `size` bytes, all that it will hold, are not written yet."""
        if self.complete:
            return 0
        there = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return max(size - there, 0)

    @property
    def lock(self) -> FileLock:
        """Held by the run that works on this folder; a run that is killed lets go of it."""
        folder = self.path.parent / LOCKS
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{self.path.name}.lock")

    @contextmanager
    def claim(self, whole: bool = False) -> Iterator[bool]:
        """Hold the folder while it is worked on; yields whether there is anything to do.

        A run that finds it held waits, and then finds it complete. Of a complete folder all files are
        compared with the manifest; damaged ones are removed, so that the work goes on where they are missing.

        Args:
            whole: its files are one piece of work: if one is damaged, all are removed.
        """
        if self.complete and not self.damaged():
            yield False
            return
        lock = self.lock
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another run works on %s; waiting for it", self.path)
            lock.acquire()
        try:
            self.clear_damage(whole)
            yield not self.complete
        finally:
            lock.release()

    def damaged(self) -> list[str]:
        """Names of files, the manifest included, that are missing or not as the manifest has them."""
        try:
            manifest = self.manifest
        except ValueError:
            return [MANIFEST]
        bad_manifest = [] if manifest.get("checksum") == checksum(manifest) else [MANIFEST]
        files = manifest.get("files")
        if not isinstance(files, dict):
            return [MANIFEST]

        def differs(name: str) -> bool:
            file, known = self.path / name, files[name]
            if not file.is_file() or file.stat().st_size != known.get("bytes"):
                return True
            return file_sha256(file) != known.get("sha256")

        # A manifest that is damaged itself may name anything.
        root = self.path.resolve()
        named = [name for name in files if "\0" not in name]  # which no file's name can hold
        names = [name for name in named if (self.path / name).resolve().is_relative_to(root)]
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            differ = pool.map(differs, names)
            return bad_manifest + [name for name, bad in zip(names, differ, strict=True) if bad]

    def clear_damage(self, whole: bool) -> None:
        """Remove damaged files, and the manifest with them; a folder that is whole or unfinished is kept."""
        bad = self.damaged() if self.complete else []
        for name in bad:
            log.error("%s is damaged or missing; it is made again", self.path / name)
        if whole and bad not in ([], [MANIFEST]):
            shutil.rmtree(self.path)
            return
        for name in bad:
            file = self.path / name
            if file.parent.name in WHOLE:
                shutil.rmtree(file.parent, ignore_errors=True)
                continue
            # Files of one piece are made together and share their name up to the first dot; summaries say
            # which pieces of their folder are done.
            for part in [
                *file.parent.glob(f"{glob.escape(file.name.split('.')[0])}.*"),
                *file.parent.glob("*.summary.json"),
            ]:
                part.unlink(missing_ok=True)
        if bad:
            (self.path / MANIFEST).unlink(missing_ok=True)

    def finish(
        self,
        inputs: dict[str, Any],
        counts: dict[str, Any],
        seconds: float,
        leave_out: Collection[str] = (),
    ) -> None:
        """Write the manifest: what went in, what came out, checksums of every file, provenance.

        `peak_memory_bytes` is the most that this process has held so far, which is the stage's own peak only
        where it ran inline and alone.

        Args:
            leave_out: files that later runs write anew.
        """
        manifest = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "format": FORMAT,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_bytes(),
            "inputs": json.loads(json.dumps(inputs, default=lambda m: m.model_dump(mode="json"))),
            "counts": counts,
            "provenance": provenance(),
        }
        seal(self.path, manifest, leave_out)


def seal(folder: Path, manifest: dict[str, Any], leave_out: Collection[str] = ()) -> None:
    """Write a manifest with the checksums of the files that lie there now, and of itself."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".") and file.name not in (MANIFEST, *leave_out)
    }
    manifest = {**manifest, "files": files}
    write_json(folder / MANIFEST, {**manifest, "checksum": checksum(manifest)})


def checksum(manifest: dict[str, Any]) -> str:
    """The checksum of a manifest as it reads from its file, without the field `checksum`."""
    content = json.loads(json.dumps({name: value for name, value in manifest.items() if name != "checksum"}))
    return fingerprint(content)


def open_artifact(storage: Path, stage: str, inputs: dict[str, Any]) -> Artifact:
    """The artifact folder of a stage with these inputs; it is created by the first write.

    `inputs` holds all that the result depends on: config groups and fingerprints of earlier artifacts.
    """
    digest = fingerprint({"stage": stage, "format": FORMAT, "inputs": inputs})
    artifact = Artifact(storage / f"{stage}-{digest}", stage, digest)
    tell(Opened(artifact.path))
    return artifact
