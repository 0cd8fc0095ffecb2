"""Which cells of a sweep are timed: by config, by prediction, on a plane, and which are timed again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.axes import BASELINES, NOTHING, Cell, Place, budget_order, family
from pipeline.config.schema import Config
from pipeline.config.sweep import Measure, Sweep
from pipeline.store.rows import PredictedRow
from pipeline.sweep.grid import (
    Drafter,
    cells_at,
    cells_behind,
    chosen,
    chosen_drafter,
    draft_sources,
    views_of,
)


def configured_picks(sweep: Sweep, drafters: Sequence[Drafter], place: Place) -> list[Cell]:
    """The cells that the config names for measuring, of every baseline too, by each rule of acceptance."""
    measure = sweep.measure
    return [
        replace(cell, rule=rule)
        for drafter in drafters
        if drafter.baseline or chosen_drafter(drafter.name, measure.drafters)
        for cell in cells_at(sweep, drafter, place)
        if not cell.control
        and (cell.view == NOTHING or chosen(cell.budget, measure.budgets))
        and chosen(cell.gamma, measure.gammas)
        for rule in sweep.rules
    ]


def picks_at(
    sweep: Sweep, drafters: Sequence[Drafter], place: Place, pointed_at: Iterable[Cell] = ()
) -> tuple[Cell, ...]:
    """What is measured in a place: what the config names, what predictions point at, the plane's cells."""
    picks = configured_picks(sweep, drafters, place)
    return tuple(dict.fromkeys([*picks, *pointed_at, *plane_picks(sweep, place, drafters)]))


def timed_temperatures(sweep: Sweep) -> tuple[float, ...]:
    return tuple(t for t in sweep.temperatures if chosen(t, sweep.measure.temperatures))


def measures_again(sweep: Sweep) -> bool:
    """Whether the fastest cells are measured again: they are found among greedy rows."""
    return sweep.predicts and 0.0 in timed_temperatures(sweep)


def batches(measure: Measure, prompts: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of prompts that are timed together, out of the prompts of a place."""
    count, size = min(prompts, measure.prompts), measure.prompts_together
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def unranked(config: Config) -> str:
    """Why no measured cell will be recommended, where that is certain beforehand; else ""."""
    measure, least = config.sweep.measure, config.report.least_documents
    most = len(batches(measure, config.data.prompts))
    if config.sweep.mode == "replay" or most >= least:
        return ""
    return (
        f"sweep.measure.prompts = {measure.prompts}, {measure.prompts_together} decoded together, is at most "
        f"{most} documents with a clock of their own, and report.least_documents is {least}: nothing will be "
        "recommended"
    )


BEST_PREDICTED = 3  # cells of a data set and context that are measured for being the fastest by prediction

FASTEST_MEASURED = 3  # of those that are measured again

# How many times the repeats of the first measurement they get: these cells lie close together, and on a
# machine that others use few repeats would order them by luck.
REPEATS_AGAIN = 4


def by_place(rows: Iterable[PredictedRow]) -> dict[Place, list[PredictedRow]]:
    """The rows of each place, the fastest first."""
    places: dict[Place, list[PredictedRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.speedup.mean):
        places[row.cell.place].append(row)
    return dict(places)


def worth_measuring(here: Sequence[Cell], drafters: Sequence[str]) -> list[Cell]:
    """Of one place: the fastest by prediction, each baseline's fastest, the corners of the best plane.

    Args:
        here: cells of one place, the fastest by prediction first.
        drafters: those that may be deployed; of a variant with several training seeds only the first, so
            that a lucky seed is not picked.
    """
    trained = [cell for cell in here if cell.drafter in drafters and cell.drafter not in BASELINES]
    picked = list(trained[:BEST_PREDICTED])
    for name in BASELINES:
        picked += [cell for cell in here if cell.drafter == name][:1]
    if trained:
        picked += corners([cell for cell in trained if plane_of(cell) == plane_of(trained[0])])
    return list(dict.fromkeys(picked))


def most_timed(config: Config, place: Place) -> set[Cell]:
    """The named cells of a place and, where speed is predicted, the most that predictions can point at.

    `worth_measuring` picks from made-up predictions, once for every plane: a cell of the plane is the
    fastest, and next come the cells that add most.
    """
    sources = {source.name: source for source in draft_sources(config)}
    named, most = set(picks_at(config.sweep, list(sources.values()), place)), set[Cell]()
    timed, names = {cell.drafter for cell in named}, first_seeds(list(sources))
    swept = [
        cell
        for name in names
        if sources[name].predictable
        for cell in cells_at(config.sweep, sources[name], place)
    ]
    cells = [cell for cell in swept if not cell.control and not cell.threshold]
    trained = [cell for cell in cells if not sources[cell.drafter].baseline] if config.sweep.predicts else []
    for plane in dict.fromkeys(map(plane_of, trained)):
        plane_cells = [cell for cell in trained if plane_of(cell) == plane]
        taken = {*named, *corners(plane_cells)}
        free = [cell for cell in cells if cell not in taken]
        fastest = [*(cell for cell in plane_cells if cell not in taken), plane_cells[0]][0]
        # One cell of each source that is not timed yet, before a second cell of any source.
        others = {cell.drafter: cell for cell in reversed(free) if cell.drafter not in {plane[0], *timed}}
        order = dict.fromkeys([fastest, *others.values(), *free, *cells])
        added = set(worth_measuring(list(order), names)) - named
        most = max(most, added, key=lambda more: (len(more), len({cell.drafter for cell in more} - timed)))
    return named | most


def plane_of(cell: Cell) -> tuple[str, str]:
    """The plane of a cell by its drafter and policy; its points are all budgets and γ of these."""
    return cell.drafter, cell.policy


def corners(plane: Sequence[Cell]) -> list[Cell]:
    """The cells of the smallest and the largest budget with the smallest and the largest γ."""
    budgets = sorted({cell.budget for cell in plane}, key=budget_order)
    gammas = sorted({cell.gamma for cell in plane})
    ends = {(b, g) for b in (budgets[0], budgets[-1]) for g in (gammas[0], gammas[-1])}
    return [cell for cell in plane if (cell.budget, cell.gamma) in ends]


def first_seeds(drafters: Sequence[str]) -> list[str]:
    """The drafter of the first training seed of every variant."""
    return list({family(drafter): drafter for drafter in reversed(drafters)}.values())


def has_plane(sweep: Sweep, place: Place) -> bool:
    plane = sweep.measure.plane
    return plane is not None and (plane.dataset, plane.context) == place


def plane_picks(sweep: Sweep, place: Place, drafters: Sequence[Drafter]) -> list[Cell]:
    """The plane that scores predictions, where this is its place: every budget and γ of one drafter."""
    plane = sweep.measure.plane
    if plane is None or not has_plane(sweep, place):
        return []
    drafter = next(drafter for drafter in drafters if chosen_drafter(drafter.name, [plane.drafter]))
    return [
        cell
        for view in views_of(sweep, drafter)
        if view.policy == sweep.policies[0] and not view.control
        for cell in cells_behind(sweep, drafter, place, view)
        if not cell.threshold
    ]
