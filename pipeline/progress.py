"""Progress of long work on stderr: a bar on a terminal, a line every 15 seconds elsewhere."""

import sys
from typing import NoReturn

from tqdm import tqdm


class _Lines:
    """A text stream that turns the redrawing of a bar into lines of their own, for logs."""

    def write(self, text: str) -> int:
        line = text.replace("\r", "").strip()
        return sys.stderr.write(line + "\n") if line else 0

    def flush(self) -> None:
        sys.stderr.flush()


def progress(total: int, description: str, initial: int = 0) -> "tqdm[NoReturn]":
    """A context manager with `update(n)`."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        initial=initial,
        mininterval=0.2 if terminal else 15.0,
        miniters=1 if terminal else 0,
        file=sys.stderr if terminal else _Lines(),
        ncols=None if terminal else 70,
    )
