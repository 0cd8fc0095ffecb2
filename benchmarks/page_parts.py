"""Parts of the pages under docs/results: Markdown tables, and the text of a value in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.intervals import Interval
from pipeline.markdown import table
from pipeline.store.rows import CellRow


def check_table(checks: Sequence[Mapping[str, object]]) -> str:
    def value(check: Mapping[str, object]) -> str:
        shown = [check.get(name) for name in ("value", "low", "high")]
        if shown[0] is None:
            return ""
        mean, *interval = (f"{number:.3g}" for number in shown if number is not None)
        return f"{mean} [{', '.join(interval)}]" if interval else mean

    met = {True: "yes", False: "**no**", None: "not decided"}
    return table(
        ["what", "value", "target", "met", "note"],
        [
            [c["row"], value(c), c["target"], met[c["met"]], c["note"]]  # type: ignore[index]
            for c in checks
        ],
    )


def points(difference: Interval) -> str:
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def percent(share: Interval) -> str:
    return f"{100 * share.mean:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def acceptance(row: CellRow | None) -> str:
    """In percent, with its interval."""
    return percent(row.acceptance) if row and row.acceptance else ""


def speed(row: CellRow | None) -> str:
    return interval_text(row.speed.speedup) if row and row.speed else ""


def end_to_end(row: CellRow) -> str:
    return interval_text(row.speed.end_to_end) if row.speed and row.speed.end_to_end else ""


def interval_text(interval: Interval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
