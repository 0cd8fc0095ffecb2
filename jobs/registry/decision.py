"""What the gate decided, as rows and as Markdown."""

from __future__ import annotations

from typing import Literal

from pipeline.config.gate import GateConfig
from pipeline.gate.bounds import Verdict
from pipeline.gate.verdict import GatedCell
from pipeline.intervals import Interval
from pipeline.markdown import table
from pipeline.store.rows import Row

STRIP = 25  # characters of the figure in the Markdown table

SAID: dict[Verdict, str] = {
    "pass": "pass",
    "fail": "fail: the candidate is worse than what is tolerated",
    "not_enough_evidence": "not enough evidence",
}


class Side(Row):
    """One side of a comparison. `version` is its number in the registry. For finished results it is None, or
    the champion's number if they stand for the champion."""

    reference: str
    version: int | None
    drafter: str
    config: str
    hardware: str
    budgets: list[int | Literal["full"]]


class Decision(Row):
    """`gate.json`. `model` is the registered one, None for finished results. `baseline` is None if there was
    no champion."""

    verdict: Verdict
    reasons: list[str]
    model: str | None
    candidate: Side
    baseline: Side | None
    target: str
    prompts: str
    gate: GateConfig
    cells: list[GatedCell]


def title(decision: Decision) -> str:
    sides = [f"{side.drafter} ({side.config})" for side in (decision.candidate, decision.baseline) if side]
    return f"{' against '.join(sides)}: {SAID[decision.verdict]}"


def markdown(decision: Decision) -> str:
    """The summary for a CI service."""
    lines = [f"## Gate: {SAID[decision.verdict]}", "", *(f"- {reason}" for reason in decision.reasons), ""]
    head = ("", "drafter", "config", "trained on budgets", "version", "hardware of timings")
    sides = (("candidate", decision.candidate), ("baseline", decision.baseline))
    lines.append(table(head, [side_line(decision, name, side) for name, side in sides if side]))
    if decision.cells:
        lines += ["", cell_table(decision)]
    return "\n".join(lines) + "\n"


def side_line(decision: Decision, name: str, side: Side) -> tuple[str, ...]:
    budgets = ", ".join(map(str, side.budgets)) or "none"
    version = f"{decision.model} {side.version}" if side.version else side.reference
    return name, f"`{side.drafter}`", side.config, budgets, version, side.hardware or "none"


def cell_table(decision: Decision) -> str:
    """One line for each cell, with its interval drawn as text: the figure, where no image can be shown."""
    chance = f"{100 * decision.gate.error_rate:g} %"
    known = [(cell.low, cell.high, cell.floor, cell.difference) for cell in decision.cells]
    at = [100 * value for values in known for value in values if value is not None]
    head = (
        "cell", "of", "candidate", "baseline", "difference", "bounds", "drawn", "tolerated", "documents",
        "prompts, looping", "without looping", "`other_prompt`", "outcome",
    )  # fmt: skip
    rows = [cell_line(cell, min(at), max(at)) for cell in decision.cells]
    return (
        "Differences and bounds are in points of acceptance, or % of speedup; `┊` is the least that is "
        f"tolerated. A lower bound errs with a chance of {chance}, and so do all upper bounds together.\n\n"
        f"{table(head, rows)}"
    )


def cell_line(cell: GatedCell, least: float, most: float) -> list[str]:
    speed = cell.metric == "speed"
    sides = [f"{x:.2f}×" if speed else f"{100 * x:.1f} %" for x in (cell.candidate, cell.baseline)]
    known = cell.low is not None and cell.high is not None
    bounds = f"[{points(cell.low)}, {points(cell.high)}]" if known else "too few documents"
    return [
        cell.name,
        cell.metric,
        *sides,
        points(cell.difference),
        bounds,
        f"`{strip(cell, least, most)}`",
        points(cell.floor),
        str(cell.num_documents),
        f"{cell.num_prompts}, {cell.num_looping}",
        with_interval(cell.not_looping),
        with_interval(cell.other_prompt),
        {
            "pass": "pass",
            "fail": "**fail**",
            "open": f"open, needs {cell.documents_needed or 'no number of'} documents",
        }[cell.outcome],
    ]


def strip(cell: GatedCell, least: float, most: float) -> str:
    """The interval as text, from `least` to `most` in percent."""

    def column(value: float) -> int:
        return round((100 * value - least) / ((most - least) or 1) * (STRIP - 1))

    drawn = ["·"] * STRIP
    if cell.low is not None and cell.high is not None:
        for at in range(column(cell.low), column(cell.high) + 1):
            drawn[at] = "─"
    drawn[column(cell.floor)] = "┊"
    drawn[column(cell.difference)] = "●"
    return "".join(drawn)


def points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f}"


def with_interval(interval: Interval | None) -> str:
    return f"{points(interval.mean)} [{points(interval.low)}, {points(interval.high)}]" if interval else ""
