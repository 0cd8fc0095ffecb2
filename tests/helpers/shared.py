"""What the processes of a test session share: a folder that one of them makes and all read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, filled by the first process that asks for it. It may not be changed."""
    own = factory.getbasetemp()
    together = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder, whole = together / "shared" / name, together / "shared" / f"{name}.whole"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not whole.exists():
            make(folder)
            whole.touch()
    return folder
