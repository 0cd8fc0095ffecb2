"""Where the storage folder is, and what is said where it cannot be."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.store import storage
from pipeline.store.storage import make_storage, storage_folder

NOBODY = 65_534


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that somebody without rights can see and not write; permissions mean nothing to root."""
    folder = Path(tempfile.mkdtemp(prefix="bd"))
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o700)
    shutil.rmtree(folder)


def test_the_folder_is_absolute_and_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "to nowhere").symlink_to(tmp_path / "far" / "away")
    assert storage_folder("runs") == tmp_path / "runs"
    assert storage_folder("~/runs") == tmp_path / "home/runs"
    assert storage_folder("to nowhere/runs") == tmp_path / "far/away/runs"
    assert [path.name for path in tmp_path.iterdir()] == ["to nowhere"]


@pytest.mark.parametrize("name", ["a ?b%25#c", "ä →", "new\nline", "*[x]", "-", "quo'te\""])
def test_any_name_that_a_folder_can_have_is_taken(tmp_path: Path, name: str) -> None:
    made = make_storage(str(tmp_path / "below" / name))
    assert made == tmp_path / "below" / name and made.is_dir() and not list(made.iterdir())
    assert os.listdir(tmp_path / "below") == [name]


def test_where_no_folder_can_be_storage_and_reason_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    reasons = {
        str(tmp_path / "file"): f"{tmp_path / 'file'} is no folder",
        str(tmp_path / "file/below/it"): f"{tmp_path / 'file'} is no folder",
        str(tmp_path / "to file"): f"{tmp_path / 'file'} is no folder",
        str(tmp_path / "loop"): "loop",
        str(tmp_path / ("n" * 300)): "File name too long",
        str(tmp_path / ("n/" * 3000)): "File name too long",
        "~nobody-of-this-name/runs": "no such user",
        "a\0b": "null",
        "a\udcffb": "surrogates",
    }
    for given, reason in reasons.items():
        for look in (storage_folder, make_storage):
            with pytest.raises(ConfigError) as caught:
                look(given)
            text = str(caught.value)
            assert text.startswith("storage = ") and "set storage=PATH" in text and len(text) < 800, text
            assert reason in text and text.isprintable(), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "to file"]


def test_a_folder_that_cannot_be_made_or_written(as_nobody: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage = .*/runs: .*/runs cannot be made: Permission denied"):
        make_storage(str(as_nobody / "runs"))
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        make_storage(str(as_nobody))
    assert storage_folder(str(as_nobody)) == as_nobody, "it can be read"


def test_a_folder_that_cannot_be_read(as_nobody: Path) -> None:
    if os.getuid() == 0:
        os.seteuid(0)
    as_nobody.chmod(0o000)
    if os.getuid() == 0:
        os.seteuid(NOBODY)
    for given, reason in ((as_nobody, "may not be read"), (as_nobody / "runs", "Permission denied")):
        with pytest.raises(ConfigError, match=f"storage = {given}: .*{reason}"):
            storage_folder(str(given))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_ails_is_no_error_until_something_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A run on it may find all complete. A folder that is yet to be made is another matter."""

    def fails(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "TemporaryFile", fails)
    assert make_storage(str(tmp_path)) == tmp_path
    monkeypatch.setattr(Path, "mkdir", fails)
    with pytest.raises(ConfigError, match=f"cannot be made: {os.strerror(number)}"):
        make_storage(str(tmp_path / "new"))
