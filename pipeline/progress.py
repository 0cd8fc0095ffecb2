"""Progress of long work on stderr: a bar on a terminal, a line every 15 seconds elsewhere."""

import sys
from typing import NoReturn

from tqdm import tqdm


def progress(total: int, description: str, initial: int = 0) -> "tqdm[NoReturn]":
    """A context manager with `update(n)`."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total, desc=description, initial=initial, mininterval=interval, file=sys.stderr, leave=True
    )
