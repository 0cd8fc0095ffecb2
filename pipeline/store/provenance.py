"""What made an artifact: code, libraries, machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

COMMIT = (
    "BUDGETDRAFT_COMMIT"  # in the environment of a submitted job: the commit, with +dirty behind it if so
)

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


@cache
def provenance() -> dict[str, Any]:
    """Git commit and dirty flag of the code, versions of the libraries, and the machine."""
    code = Path(__file__).resolve().parents[2]

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
    sha, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    dirty = None if status is None else bool(status)
    if sha is None and COMMIT in os.environ:  # a job's copy of the code is no checkout
        sha, _, mark = os.environ[COMMIT].partition("+")
        dirty = bool(mark)
    return {
        "git_sha": sha,
        "git_dirty": dirty,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }
