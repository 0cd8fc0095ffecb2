"""The storage folder of a config: where it is, and what keeps a folder from being there."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

from pipeline.errors import ConfigError, disk_trouble

ADVICE = "set storage=PATH (--storage PATH) to a folder that can be made, read and written here"
SHOWN = 200  # characters of a path in a message


def with_home(path: str | Path) -> Path:
    """A path with ~ as the user's home; that of a user who has none stays as it is, and is not there."""
    return Path(os.path.expanduser(path))


def storage_folder(given: str) -> Path:
    """The absolute path of the storage folder, which need not exist yet. Nothing is written.

    Raises:
        ConfigError: if no folder can be there, or it cannot be read; the text names `storage` and why.
    """
    home = os.path.expanduser(given)
    if given.startswith("~") and home == given:
        refuse(given, "there is no such user, or no home folder")
    try:
        folder = Path(home).resolve()
        str(folder).encode()  # manifests and records hold it as text
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL, bytes that are no text
        refuse(given, str(error))
    for place in (folder, *folder.parents):
        try:
            if not stat.S_ISDIR(os.stat(place).st_mode):
                refuse(given, f"{shortened(str(place))} is no folder")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            refuse(given, error.strerror)
        break
    if folder.exists() and not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
        refuse(given, "it may not be read")
    return folder


def make_storage(given: str) -> Path:
    """Make the storage folder if it is missing, and see that files can be made in it; returns its path.

    No error where the folder is there and its disk is full, or can only be read: a run reuses what is
    complete, and says what is wrong with the disk when it has to write.

    Raises:
        ConfigError: if it cannot be made, or not be written.
    """
    folder = storage_folder(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if not folder.is_dir():
            refuse(given, f"{shortened(str(folder))} cannot be made: {error.strerror}")
        if not disk_trouble(error):
            refuse(given, f"{shortened(str(folder))} cannot be written: {error.strerror}")
    return folder


def refuse(given: str, why: str | None) -> NoReturn:
    raise ConfigError(f"storage = {shortened(given)}: {why}; {ADVICE}")


def shortened(text: str) -> str:
    """`text` for a message: its beginning, with escapes for what cannot be printed."""
    printable = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[:SHOWN])
    return printable if len(text) <= SHOWN else f"{printable}…"
