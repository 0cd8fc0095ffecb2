"""Errors that the command line turns into exit codes; everything else is a programming fault."""

from __future__ import annotations

import errno
import re

FULL = (errno.ENOSPC, errno.EDQUOT)
# As libraries say it that lose the number: safetensors, torch, Ray's workers; sqlite.
FULL_TEXTS = ("No space left on device", "database or disk is full", "Disk quota exceeded")


class BadData(ValueError):
    """Input data that cannot be used. The text names the file or field and says what to do."""


class Incomplete(RuntimeError):
    """A stage ended with work undone. The text says what is missing and how to resume."""


class NotFinite(ArithmeticError):
    """Logits, a loss or a gradient are NaN or infinite. The text says whose, and where."""


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


class ConfigError(ValueError):
    """A config that cannot be used. The text is complete: no traceback is needed to act on it."""

    def __init__(self, text: str) -> None:
        super().__init__(hide_credentials(text))


def hide_credentials(text: str) -> str:
    """`text` with the user:password of every URL in it replaced by ***."""
    return re.sub(r"://[^/\s]*@", "://***@", text)
