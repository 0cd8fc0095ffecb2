"""What befalls a storage while a run uses it becomes an error for people; other errors stay what they are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jobs.stages import pipeline
from jobs.stages.pipeline import run_pipeline, storage_troubles
from pipeline.errors import BadData, ConfigError, Incomplete
from tests.helpers.tiny import tiny_config


def test_a_file_of_somebody_else_is_named(tmp_path: Path) -> None:
    file = f"{tmp_path}/teach-0123456789ab/manifest.json"
    with (
        pytest.raises(BadData, match=f"Permission denied: '{file}': .* storage {tmp_path} .*permissions"),
        storage_troubles(str(tmp_path)),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)


def test_what_is_worded_already_stays(tmp_path: Path) -> None:
    """Though it came from a full disk: that of Ray's temporary files, not the storage's."""
    with pytest.raises(ConfigError, match=r"^TMPDIR = /full: set another$"), storage_troubles(str(tmp_path)):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise ConfigError("TMPDIR = /full: set another") from None
    with pytest.raises(KeyError), storage_troubles(str(tmp_path)):
        raise KeyError("a fault of the program")


def test_a_disk_that_is_full_when_mlflow_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline.Tracker, "start", full)
    config = tiny_config({"storage": str(tmp_path / "runs")})
    with pytest.raises(Incomplete, match=r"a disk is full; the storage .*/runs has"):
        run_pipeline(config)
