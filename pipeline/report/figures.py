"""The report's figures, one function each, drawn to PNG without a display or pyplot's global state.

Each function returns a matplotlib figure, or a text that says why there is nothing to draw. A variant has one
colour and a budget one marker in all figures; the palette is Okabe and Ito's, safe for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from pipeline.axes import Budget, Place, budget_order, budget_text, family
from pipeline.results.axes import Axes
from pipeline.results.summary import Estimate
from pipeline.store.files import atomic_path
from pipeline.store.rows import CellRow, OfCell

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 150,
}

FILLS = ("full", "none", "left", "right")

Drawn = Figure | str


@dataclass(frozen=True)
class Look:
    """Colour by drafter; marker by budget and fill by policy, among the cells that a figure may show."""

    colours: dict[str, str]
    markers: dict[Budget, str]
    fills: dict[str, str]

    @staticmethod
    def of(rows: Collection[OfCell], axes: Axes) -> Look:
        budgets = sorted({row.cell.budget for row in rows}, key=budget_order)
        policies = sorted({row.cell.policy for row in rows})
        colours = dict(zip(dict.fromkeys(map(family, axes.drafters)), cycle(PALETTE)))
        return Look(
            colours={drafter: colours[family(drafter)] for drafter in axes.drafters},
            markers=dict(zip(budgets, cycle(MARKERS))),
            fills=dict(zip(policies, cycle(FILLS))),
        )


def draw_all(
    cells: Sequence[CellRow], acceptance: Sequence[Estimate], axes: Axes, folder: Path
) -> dict[str, str]:
    """Write the PNGs into `folder`. Returns each figure's name → "" where drawn, else why it is not.

    With several temperatures or seeds, figures show the lowest temperature and its first seed, and of a
    variant that was trained with several seeds the first drafter. Cells of a lossy rule are in none.
    """
    sampling = min(((e.cell.temperature, e.cell.seed) for e in acceptance), default=(0.0, 0))
    firsts = {family(drafter): drafter for drafter in reversed(axes.drafters)}.values()
    shown = [
        e for e in acceptance if (e.cell.temperature, e.cell.seed) == sampling and e.cell.drafter in firsts
    ]
    measured = [
        c
        for c in cells
        if c.speed is not None
        and c.cell.control is None
        and not c.cell.threshold
        and not c.cell.lossy
        and (c.cell.temperature, c.cell.seed) == sampling
    ]
    draws: dict[str, Callable[[], Drawn]] = {
        f"acceptance_by_budget_{policy}": partial(acceptance_by_budget, shown, axes, policy)
        for policy in sorted({e.cell.policy for e in shown})
    }
    draws["speedup_by_context"] = partial(speedup_by_context, measured, axes)
    draws["speedup_by_gamma"] = partial(speedup_by_gamma, measured, axes)
    draws["speedup_by_memory"] = partial(speedup_by_memory, measured, axes)
    reasons = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in draws.items():
            drawn = draw()
            if isinstance(drawn, Figure):
                with atomic_path(folder / f"{name}.png") as temporary:
                    drawn.savefig(temporary, format="png", bbox_inches="tight")
            reasons[name] = drawn if isinstance(drawn, str) else ""
    return reasons


def acceptance_by_budget(estimates: Sequence[Estimate], axes: Axes, policy: str) -> Drawn:
    """Acceptance against budget, a line a drafter with its 95 % band; the controls dashed and hollow."""
    chosen = {
        (e.cell.dataset, e.cell.context, e.cell.drafter, e.cell.control, e.cell.budget): e
        for e in estimates
        if (e.cell.gamma, e.cell.policy) == (axes.gamma, policy)
    }
    if not chosen:
        return f"No acceptance at γ = {axes.gamma}."
    budgets = sorted({e.cell.budget for e in chosen.values()}, key=budget_order)
    if len(budgets) < 2:
        return f"Acceptance is known at one budget only ({budgets[0]})."
    figure, panels = _panels(chosen.values(), axes)
    look = Look.of(chosen.values(), axes)
    for (dataset, context), panel in panels.items():
        for drafter in axes.drafters:
            for control in (None, "other_prompt", "no_prefix"):
                line = [
                    (budgets.index(budget), chosen[dataset, context, drafter, control, budget])
                    for budget in budgets
                    if (dataset, context, drafter, control, budget) in chosen
                ]
                if line:
                    _acceptance_line(panel, line, look.colours[drafter], control)
        panel.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
        panel.set_xlim(-0.3, len(budgets) - 0.7)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    figure.supxlabel("budget: prefix KV entries the drafter keeps, per layer and head", fontsize=10)
    figure.supylabel(f"acceptance rate (γ = {axes.gamma}, {policy})", fontsize=10)
    controls = {e.cell.control for e in chosen.values()}
    handles: list[Line2D | Patch] = [*_drafter_handles(chosen.values(), look)]
    handles.append(Patch(color="#999999", alpha=0.3, label="95 % interval over documents"))
    if "other_prompt" in controls:
        handles.append(Line2D([], [], color="#555555", ls="--", label="control: another document's KV"))
    if "no_prefix" in controls:
        handles.append(
            Line2D([], [], color="#555555", ls="", marker="o", mfc="white", label="control: no prefix")
        )
    _legend(figure, handles)
    return figure


def _acceptance_line(
    panel: Panel, line: Sequence[tuple[int, Estimate]], colour: str, control: str | None
) -> None:
    x = [position for position, _ in line]
    mean = [e.value.mean for _, e in line]
    if control == "no_prefix":
        panel.plot(x, mean, color=colour, ls="", marker="o", mfc="white")
    elif control is not None:
        panel.plot(x, mean, color=colour, ls="--", lw=1.3)
    else:
        panel.plot(x, mean, color=colour, marker="o", ms=4.5, lw=1.8)
        low, high = [e.value.low for _, e in line], [e.value.high for _, e in line]
        panel.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def speedup_by_context(measured: Sequence[CellRow], axes: Axes) -> Drawn:
    """Speedup against context at one γ, a point a drafter, policy and budget."""
    if not measured:
        return "No cell's wall clock was measured."
    look = Look.of(measured, axes)
    gamma, at_gamma = _at_gamma(measured, axes)
    contexts = [name for name in axes.contexts if any(c.cell.context == name for c in at_gamma)]
    series = _series(at_gamma, axes)
    figure, panels = _panels(at_gamma, axes, by_context=False)
    for (dataset, _), panel in panels.items():
        for index, cells in enumerate(series.values()):
            shift = 0.5 * ((index + 0.5) / len(series) - 0.5)
            here = sorted(
                (c for c in cells if c.cell.dataset == dataset), key=lambda c: axes.contexts[c.cell.context]
            )
            _speed_line(panel, here, [contexts.index(c.cell.context) + shift for c in here], look, line=False)
        panel.set_xticks(
            range(len(contexts)), [_context_text(name, axes.contexts[name]) for name in contexts]
        )
        panel.set_xlim(-0.5, len(contexts) - 0.5)
        panel.grid(axis="x", visible=False)
    figure.supxlabel("context (prompt tokens)", fontsize=10)
    figure.supylabel(f"decode speedup (γ = {gamma})", fontsize=10)
    _legend(figure, _speed_handles(at_gamma, look))
    return figure


def speedup_by_gamma(measured: Sequence[CellRow], axes: Axes) -> Drawn:
    """Speedup against γ, a line a drafter, policy and budget."""
    if not measured:
        return "No cell's wall clock was measured."
    gammas = sorted({c.cell.gamma for c in measured})
    if len(gammas) < 2:
        return f"Wall clock was measured at one γ only ({gammas[0]})."
    look = Look.of(measured, axes)
    figure, panels = _panels(measured, axes)
    for (dataset, context), panel in panels.items():
        for cells in _series(measured, axes).values():
            here = sorted(
                (c for c in cells if (c.cell.dataset, c.cell.context) == (dataset, context)),
                key=lambda c: c.cell.gamma,
            )
            _speed_line(panel, here, [c.cell.gamma for c in here], look, line=True)
        panel.xaxis.set_major_locator(FixedLocator(gammas))
    figure.supxlabel("γ (tokens drafted per round)", fontsize=10)
    figure.supylabel("decode speedup", fontsize=10)
    _legend(figure, _speed_handles(measured, look))
    return figure


def speedup_by_memory(measured: Sequence[CellRow], axes: Axes) -> Drawn:
    """Speedup against the drafter's KV memory at one γ, with the target's KV memory as a vertical line."""
    if not measured:
        return "No cell's wall clock was measured."
    look = Look.of(measured, axes)
    gamma, at_gamma = _at_gamma(measured, axes)
    targets = {
        place: max(
            (c.target_kv_bytes for c in at_gamma if c.cell.place == place and c.target_kv_bytes), default=0
        )
        for place in {c.cell.place for c in at_gamma}
    }
    sizes = [*targets.values(), *(c.drafter_kv_bytes for c in at_gamma)]
    unit, divisor = ("MiB", 2**20) if max(sizes) >= 2**20 else ("KiB", 2**10)
    figure, panels = _panels(at_gamma, axes)
    for place, panel in panels.items():
        for cell in (c for c in at_gamma if c.cell.place == place):
            _speed_line(panel, [cell], [cell.drafter_kv_bytes / divisor], look, line=False)
        if place in targets:
            panel.axvline(targets[place] / divisor, color="#555555", ls=":", lw=1.6)
        if min(sizes) > 0 and max(sizes) > 10 * min(sizes):
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel(f"KV memory of the drafter ({unit})", fontsize=10)
    figure.supylabel(f"decode speedup (γ = {gamma})", fontsize=10)
    target = Line2D([], [], color="#555555", ls=":", lw=1.6, label="the target's KV memory")
    _legend(figure, [*_speed_handles(at_gamma, look), target])
    return figure


def _panels(
    cells: Collection[OfCell], axes: Axes, by_context: bool = True
) -> tuple[Figure, dict[Place, Panel]]:
    """A grid of panels: a row a data set, a column a context (or data sets side by side)."""
    datasets = [name for name in axes.datasets if any(row.cell.dataset == name for row in cells)]
    contexts = (
        [name for name in axes.contexts if any(row.cell.context == name for row in cells)]
        if by_context
        else [""]
    )
    rows, columns = (len(datasets), len(contexts)) if by_context else (1, len(datasets))
    width = {1: 6.6, 2: 4.2}.get(columns, 3.3)
    figure = Figure(figsize=(width * columns, 3.0 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    present = {Place(row.cell.dataset, row.cell.context if by_context else "") for row in cells}
    panels = {}
    for place, panel in zip([Place(d, c) for d in datasets for c in contexts], grid.flat, strict=True):
        if place in present:
            panel.set_title(", ".join(name for name in place if name))
            panels[place] = panel
        else:
            panel.set_visible(False)
    return figure, panels


def _at_gamma(measured: Sequence[CellRow], axes: Axes) -> tuple[int, list[CellRow]]:
    """The measured cells at the γ nearest to the one that the report leads with."""
    gamma = min({c.cell.gamma for c in measured}, key=lambda gamma: (abs(gamma - axes.gamma), gamma))
    return gamma, [c for c in measured if c.cell.gamma == gamma]


def _series(measured: Sequence[CellRow], axes: Axes) -> dict[tuple[str, str, Budget], list[CellRow]]:
    series: dict[tuple[str, str, Budget], list[CellRow]] = {}
    for cell in sorted(measured, key=lambda row: axes.order(row.cell)):
        series.setdefault((cell.cell.drafter, cell.cell.policy, cell.cell.budget), []).append(cell)
    return series


def _speed_line(panel: Panel, cells: Sequence[CellRow], x: Sequence[float], look: Look, line: bool) -> None:
    """Speedups of one drafter, policy and budget with their intervals, and the level of AR decoding."""
    panel.axhline(1.0, color="#222222", lw=1.0)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}×"))
    if not cells:
        return
    speeds = [cell.speed.speedup for cell in cells if cell.speed]
    panel.errorbar(
        x,
        [speed.mean for speed in speeds],
        # A percentile interval need not hold the mean.
        yerr=[[max(s.mean - s.low, 0) for s in speeds], [max(s.high - s.mean, 0) for s in speeds]],
        color=look.colours[cells[0].cell.drafter],
        marker=look.markers[cells[0].cell.budget],
        fillstyle=look.fills[cells[0].cell.policy],
        ls="-" if line else "",
        ms=6.5,
        lw=1.4,
        capsize=2.5,
    )


def _context_text(name: str, tokens: int) -> str:
    return name if name == str(tokens) else f"{name}\n({tokens:,})"


def _drafter_handles(rows: Collection[OfCell], look: Look) -> list[Line2D]:
    present = {row.cell.drafter for row in rows}
    return [
        Line2D([], [], color=colour, lw=2.4, label=drafter)
        for drafter, colour in look.colours.items()
        if drafter in present
    ]


def _speed_handles(rows: Collection[OfCell], look: Look) -> list[Line2D]:
    handles = _drafter_handles(rows, look)
    handles += [
        Line2D([], [], marker=marker, label=budget_text(budget), color="#555555", ls="")
        for budget, marker in look.markers.items()
    ]
    if len(look.fills) > 1:
        handles += [
            Line2D([], [], marker="o", fillstyle=fill, label=policy, color="#555555", ls="")
            for policy, fill in look.fills.items()
        ]
    return [*handles, Line2D([], [], color="#222222", lw=1.0, label="autoregressive decoding")]


def _legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    columns = 3 if figure.get_figwidth() < 8 else 4
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns, fontsize=9)
