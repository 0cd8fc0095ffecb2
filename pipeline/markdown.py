"""Tables in Markdown, for cards, pages and summaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    first, *rest = (f"| {' | '.join(map(str, line))} |" for line in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *rest])
