"""Progress of long work on stderr: a bar on a terminal, a line every 15 seconds elsewhere."""

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.observe.events import Began, Items, tell

if TYPE_CHECKING:
    from typing import NoReturn

    Bar = tqdm[NoReturn]
else:
    Bar = tqdm


class _Lines:
    """A text stream that turns the redrawing of a bar into lines of their own, for logs."""

    def write(self, text: str) -> int:
        line = text.replace("\r", "").strip()
        return sys.stderr.write(line + "\n") if line else 0

    def flush(self) -> None:
        sys.stderr.flush()


class Progress(Bar):
    """A bar that also tells of items that were lost or given up."""

    def update(self, n: float | None = 1) -> bool | None:
        tell(Items(done=int(n or 0)))
        return super().update(n)

    def retried(self) -> None:
        """An item was lost with its worker and is tried again."""
        tell(Items(retried=1))

    def failed(self) -> None:
        """An item is given up."""
        tell(Items(failed=1))


def progress(total: int, description: str, initial: int = 0) -> Progress:
    """A context manager with `update(n)`, `retried()` and `failed()`."""
    tell(Began(description, total, initial))
    terminal = sys.stderr.isatty()
    style: dict[str, Any] = {
        "mininterval": 0.2 if terminal else 15.0,
        "miniters": 1 if terminal else 0,
        "file": sys.stderr if terminal else _Lines(),
        "ncols": None if terminal else 70,
    }
    return Progress(total=total, desc=description, initial=initial, **style)
