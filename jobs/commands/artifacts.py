"""What a storage folder holds, who uses it, and the removal of what nothing needs.

An artifact is needed if a finished report, or the end of improving a drafter, is made from it, directly or
through others: manifests name the fingerprints of their inputs. An artifact that was worked on after the last
report is needed too: its report may be still to come. If a run is alive, or a manifest that matters is
missing or damaged, it is uncertain what is needed, and no complete artifact is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from jobs.records.record import RECORDS, lives
from pipeline.errors import BadData, ConfigError
from pipeline.store.artifacts import LOCKS, Artifact, checksum
from pipeline.store.layout import IMPROVE
from pipeline.units import decimal_size

NAME = re.compile(r"(?P<stage>.+)-(?P<fingerprint>[0-9a-f]{12})")
COMPLETE, UNFINISHED, DAMAGED, IN_USE = "complete", "unfinished", "damaged", "in use"
# Kept beside the artifacts; listed, never removed.
BESIDE = (".ray_train", "mlartifacts", "mlflow.db", RECORDS)
TRASH = ".trash-"
DAY_S = 86_400


@dataclass
class Stored:
    """One artifact folder. `age_s` counts from the last change of a file; `inputs` are fingerprints."""

    name: str
    stage: str
    fingerprint: str
    state: str
    bytes: int
    age_s: float
    inputs: list[str]
    used_by: list[str] = field(default_factory=list)
    needed: bool = False


def list_artifacts(storage: Path) -> list[Stored]:
    """The artifacts of a storage, the largest first.

    Raises:
        BadData: if the folder is no storage.
    """
    if not storage.is_dir():
        raise BadData(f"there is no folder {storage}: name the folder that a config calls storage")
    folders = {
        path: match for path in storage.iterdir() if (match := NAME.fullmatch(path.name)) and _own(path)
    }
    if not folders and not any((storage / name).exists() for name in BESIDE):
        raise BadData(f"{storage} holds no artifacts: name the folder that a config calls storage")
    known = {match["fingerprint"] for match in folders.values()}
    now = time.time()
    listed = [_read(Artifact(path, m["stage"], m["fingerprint"]), known, now) for path, m in folders.items()]
    for stored in listed:
        stored.used_by = sorted(other.name for other in listed if stored.fingerprint in other.inputs)
    _mark_needed(listed)
    return sorted(listed, key=lambda stored: -stored.bytes)


def _own(path: Path) -> bool:
    """A folder here, not a link to one elsewhere."""
    return path.is_dir() and not path.is_symlink()


def _read(artifact: Artifact, known: set[str], now: float) -> Stored:
    state, inputs = UNFINISHED, set[str]()
    if artifact.complete:
        try:
            manifest = artifact.manifest
        except ValueError:
            state = DAMAGED
        else:
            state = COMPLETE if manifest.get("checksum") == checksum(manifest) else DAMAGED
            inputs = known & set(_texts(manifest["inputs"])) if state == COMPLETE else set()
    if _held(artifact):
        state = IN_USE
    size, changed = _measure(artifact.path)
    return Stored(
        artifact.path.name,
        artifact.stage,
        artifact.fingerprint,
        state,
        size,
        max(0.0, now - changed),
        sorted(inputs),
    )


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _held(artifact: Artifact) -> bool:
    # Without a lock file no run holds it; taking the lock would make one, and the storage may be read-only.
    if not (artifact.path.parent / LOCKS / f"{artifact.path.name}.lock").exists():
        return False
    try:
        with artifact.lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _measure(path: Path) -> tuple[int, float]:
    """Bytes, and the time of the last change, of a file or of all that a folder holds."""
    stats = [path.lstat()]
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                stats.append((Path(folder) / name).lstat())
            except FileNotFoundError:
                continue  # a temporary file of a run that works here
    files = stats[1:] if path.is_dir() else stats
    return sum(stat.st_size for stat in files), max(stat.st_mtime for stat in stats)


def _mark_needed(listed: list[Stored]) -> None:
    """Mark every report, the ends of improving, everything younger than all reports, unfinished work too, and
    what these are made from. A damaged report counts, since a rerun mends it."""
    by_fingerprint = {stored.fingerprint: stored for stored in listed}
    waiting = [stored for stored in listed if stored.stage == "report" and stored.state != UNFINISHED]
    last = min((stored.age_s for stored in waiting), default=float("inf"))
    waiting += [stored for stored in listed if stored.stage == IMPROVE]
    waiting += [stored for stored in listed if stored.state != DAMAGED and stored.age_s < last]
    while waiting:
        stored = waiting.pop()
        if not stored.needed:
            stored.needed = True
            waiting += [by_fingerprint[name] for name in stored.inputs]


def unsure(storage: Path, listed: Sequence[Stored]) -> list[str]:
    """Names of runs that are alive, and of artifacts whose inputs matter but are in no manifest yet."""
    records = storage / RECORDS
    runs = [record.name for record in sorted(records.iterdir()) if lives(record)] if records.is_dir() else []
    held = [
        stored.name
        for stored in listed
        if stored.state == IN_USE or (stored.needed and stored.state != COMPLETE)
    ]
    return runs + held


def removable(listed: Sequence[Stored], older_than_days: float, sure: bool) -> list[Stored]:
    """Artifacts that nothing needs, no run works on and nothing changed for `older_than_days`; complete ones
    only if it is `sure` what is needed."""
    kept = (IN_USE,) if sure else (IN_USE, COMPLETE)
    return [
        stored
        for stored in listed
        if not stored.needed and stored.state not in kept and stored.age_s >= older_than_days * DAY_S
    ]


def remove(storage: Path, chosen: Sequence[Stored]) -> list[Stored]:
    """Delete artifacts, and what a killed removal has left; returns those that went.

    Each is renamed first, so that a removal that is killed leaves nothing that looks like an artifact. One
    that a run has taken meanwhile stays.
    """
    gone = []
    for stored in chosen:
        artifact = Artifact(storage / stored.name, stored.stage, stored.fingerprint)
        try:
            with artifact.lock.acquire(timeout=0):
                artifact.path.rename(storage / f"{TRASH}{stored.name}-{uuid.uuid4().hex[:8]}")
        except Timeout:
            continue
        gone.append(stored)
    for trash in storage.glob(f"{TRASH}*"):
        shutil.rmtree(trash)
    return gone


def artifacts(
    storage: Path, remove_unneeded: bool, dry_run: bool, older_than_days: float, as_json: bool
) -> None:
    """The command: list what is there on stdout, and with `remove_unneeded` delete what nothing needs.

    Raises:
        BadData: if the folder is no storage.
        ConfigError: on `dry_run` without `remove_unneeded`.
    """
    if dry_run and not remove_unneeded:
        raise ConfigError("--dry-run goes with --remove: without it nothing is removed anyway")
    listed = list_artifacts(storage)
    other_sizes = {
        path.name: _measure(path)[0]
        for path in sorted(storage.iterdir())
        if path.name in BESIDE or path.name.startswith(TRASH)
    }
    doubts = unsure(storage, listed)
    going = removable(listed, older_than_days, sure=not doubts) if remove_unneeded else []
    if remove_unneeded and not dry_run:
        going = remove(storage, going)
    verb = ("would remove" if dry_run else "removed") if remove_unneeded else None
    listing = Listing(listed, other_sizes, going, doubts, verb)
    print(json.dumps(listing.document(), indent=2) if as_json else "\n".join(listing.lines()))


@dataclass
class Listing:
    """The command's output: artifacts, bytes of what lies beside them, what goes, and why not more."""

    listed: list[Stored]
    beside: dict[str, int]
    going: list[Stored]
    doubts: list[str]
    verb: str | None

    @property
    def total(self) -> int:
        return sum(stored.bytes for stored in self.listed) + sum(self.beside.values())

    @property
    def freed(self) -> int:
        return sum(stored.bytes for stored in self.going)

    def document(self) -> dict[str, Any]:
        removal = (
            {self.verb: [stored.name for stored in self.going], "freed": self.freed} if self.verb else {}
        )
        return {
            "artifacts": [asdict(stored) for stored in self.listed],
            "beside": self.beside,
            "bytes": self.total,
            "unsure_because_of": self.doubts,
            **{name.replace(" ", "_"): value for name, value in removal.items()},
        }

    def lines(self) -> Iterator[str]:
        rows = [("STAGE", "FINGERPRINT", "STATE", "SIZE", "AGE", "USED BY")]
        rows += [
            (
                stored.stage,
                stored.fingerprint,
                stored.state,
                decimal_size(stored.bytes),
                age(stored.age_s),
                self._users(stored),
            )
            for stored in self.listed
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for *cells, users in rows:
            yield "  ".join([cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] + [users])
        for name, count in self.beside.items():
            yield f"{name}: {decimal_size(count)}"
        total = decimal_size(self.total)
        yield f"total: {total} in {len(self.listed)} artifacts and {len(self.beside)} others"
        if self.verb:
            yield from (f"{self.verb} {stored.name}: {decimal_size(stored.bytes)}" for stored in self.going)
            if self.doubts:
                yield f"complete ones stay: nothing tells yet what {', '.join(self.doubts)} is made from"
            yield f"{len(self.going)} artifacts, {decimal_size(self.freed)}"

    @staticmethod
    def _users(stored: Stored) -> str:
        return ", ".join(stored.used_by) or ("-" if stored.stage == "report" else "nothing")


def age(seconds: float) -> str:
    """In days, hours or minutes."""
    for unit, length in (("d", DAY_S), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min"
