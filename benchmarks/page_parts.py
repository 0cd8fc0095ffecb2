"""Parts of the pages under docs/results: Markdown tables, and how a value stands in a cell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from pipeline.results.recommend import Choice
from pipeline.store.rows import CellRow, PredictedRow


class Spread(Protocol):
    """A mean with its 95 % interval."""

    @property
    def mean(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def check_table(checks: Sequence[Mapping[str, object]]) -> str:
    def value(given: object) -> str:
        return "" if given is None else f"{given:.3g}"

    told = {True: "yes", False: "**no**", None: "not measured"}
    return markdown(
        ["what", "value", "target", "met", "note"],
        [
            [c["row"], value(c["value"]), c["target"], told[c["met"]], c["note"]]  # type: ignore[index]
            for c in checks
        ],
    )


def points(gain: Spread) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def percent(share: Spread) -> str:
    return f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def acceptance(cell: CellRow | None) -> str:
    """In percent, with its interval."""
    if cell is None or cell.acceptance is None or cell.acceptance_low is None or cell.acceptance_high is None:
        return ""
    return f"{100 * cell.acceptance:.1f} [{100 * cell.acceptance_low:.1f}, {100 * cell.acceptance_high:.1f}]"


def speed(cell: CellRow | PredictedRow | Choice | None) -> str:
    if cell is None or cell.speedup is None or cell.speedup_low is None or cell.speedup_high is None:
        return ""
    return interval_text((cell.speedup, cell.speedup_low, cell.speedup_high))


def end_to_end(cell: CellRow) -> str:
    low, high = cell.end_to_end_low, cell.end_to_end_high
    if cell.end_to_end_speedup is None or low is None or high is None:
        return ""
    return interval_text((cell.end_to_end_speedup, low, high))


def interval_text(interval: tuple[float, float, float]) -> str:
    mean, low, high = interval
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
