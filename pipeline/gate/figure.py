"""The gate's figure: every cell's difference with its bounds, and what is tolerated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.gate.pairs import Metric
from pipeline.gate.verdict import GatedCell
from pipeline.report.figures import PALETTE, STYLE
from pipeline.store.files import atomic_path

COLOURS = {"pass": PALETTE[0], "fail": PALETTE[1], "open": "#767676"}
SAID = {"pass": "above what is tolerated", "fail": "below it", "open": "undecided"}
AXIS = {
    "acceptance": "difference of acceptance, points (candidate − baseline)",
    "speed": "difference of decode speedup, % (candidate ÷ baseline − 1)",
}


def draw(cells: Sequence[GatedCell], title: str, file: Path) -> None:
    """Write the PNG: a panel for acceptance, and one for speed where it was compared."""
    by_metric: dict[Metric, list[GatedCell]] = {}
    for cell in cells:
        by_metric.setdefault(cell.metric, []).append(cell)
    heights = [len(rows) + 2.5 for rows in by_metric.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.0 + 0.32 * sum(heights)), layout="constrained")
        panels = figure.subplots(len(by_metric), 1, squeeze=False, height_ratios=heights)[:, 0]
        for (metric, rows), panel in zip(by_metric.items(), panels, strict=True):
            forest(panel, metric, rows)
        figure.suptitle(title, fontsize=10)
        figure.legend(handles=legend(cells), loc="outside lower center", ncols=3, fontsize=8)
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")


def forest(panel: Panel, metric: Metric, cells: Sequence[GatedCell]) -> None:
    """A row for each cell, from the top: its difference, with bounds unless documents are too few.

    Hollow markers just below show the differences under the control and without looping prompts.
    """
    for row, cell in enumerate(cells):
        colour = COLOURS[cell.outcome]
        if cell.low is not None and cell.high is not None:
            panel.plot([100 * cell.low, 100 * cell.high], [row, row], color=colour, lw=2.5, zorder=2)
        panel.plot(100 * cell.difference, row, "o", color=colour, ms=7, zorder=4)
        for interval, marker in ((cell.other_prompt, "D"), (cell.not_looping, "^")):
            if interval is not None:
                panel.plot(
                    100 * interval.mean, row + 0.27, marker, color="#000000", mfc="none", ms=6, zorder=3
                )
    panel.axvline(0, color="#b0b0b0", lw=1, zorder=1)
    panel.axvline(100 * cells[0].floor, color="#000000", ls="--", lw=1.2, zorder=1)
    panel.set_yticks(range(len(cells)), [cell.name for cell in cells], fontsize=8)
    panel.set_ylim(len(cells) - 0.4, -0.6)
    panel.grid(axis="y", visible=False)
    panel.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    panel.set_xlabel(AXIS[metric])


def legend(cells: Sequence[GatedCell]) -> list[Line2D]:
    outcomes = {cell.outcome for cell in cells}
    handles = [
        Line2D([], [], color=COLOURS[outcome], marker="o", lw=2.5, label=said)
        for outcome, said in SAID.items()
        if outcome in outcomes
    ]
    handles.append(Line2D([], [], color="#000000", ls="--", label="the least that is tolerated"))
    if any(cell.other_prompt for cell in cells):
        handles.append(hollow("D", "control: another document's KV"))
    if any(cell.not_looping for cell in cells):
        handles.append(hollow("^", "without looping prompts"))
    return handles


def hollow(marker: str, label: str) -> Line2D:
    return Line2D([], [], color="#000000", ls="", marker=marker, mfc="none", label=label)
