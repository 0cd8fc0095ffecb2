"""Errors that the command line turns into exit codes; everything else is a programming fault."""

from __future__ import annotations

import errno
import re

# What can befall a storage while a run uses it: the errors' numbers, and how libraries say it that lose the
# number (safetensors, torch, Ray's workers; sqlite); and what to do.
DISK_TROUBLES = (
    (
        "a disk is full",
        (errno.ENOSPC, errno.EDQUOT),
        ("No space left on device", "database or disk is full", "Disk quota exceeded"),
        "Free some space there (`budgetdraft artifacts` shows what nothing needs)",
    ),
    (
        "a file system can only be read",
        (errno.EROFS,),
        ("Read-only file system", "attempt to write a readonly database"),
        "Mount it for writing again, after a look at the machine's log",
    ),
    (
        "a file system has no locks",
        (errno.ENOLCK, errno.EOPNOTSUPP),
        ("No locks available",),
        "Mount it with locks, which keep two runs from doing the same work, or set another storage",
    ),
    (
        "a disk does not answer as it should",
        (errno.EIO, errno.ESTALE),
        ("Input/output error", "disk I/O error", "Stale file handle"),
        "Look at the disk, or at the mount",
    ),
)


class BadData(ValueError):
    """Input data that cannot be used. The text names the file or field and says what to do."""


class Incomplete(RuntimeError):
    """A stage ended with work undone. The text says what is missing and how to resume."""


class NotFinite(ArithmeticError):
    """Logits, a loss or a gradient are NaN or infinite. The text says whose, and where."""


def disk_trouble(error: BaseException | None) -> tuple[str, str] | None:
    """What an error, or one that it came from, says of a disk, and what to do; None for other errors."""
    while error is not None:
        for trouble, numbers, texts, advice in DISK_TROUBLES:
            if isinstance(error, OSError) and error.errno in numbers:
                return trouble, advice
            if any(text in str(error) for text in texts):
                return trouble, advice
        error = error.__cause__ or error.__context__
    return None


class ConfigError(ValueError):
    """A config that cannot be used. The text is complete: no traceback is needed to act on it."""

    def __init__(self, text: str) -> None:
        super().__init__(hide_credentials(text))


def hide_credentials(text: str) -> str:
    """`text` with the user:password of every URL in it replaced by ***."""
    return re.sub(r"://[^/\s]*@", "://***@", text)
