"""Which cells of a sweep are timed: by config, by prediction, on a plane, once more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.axes import Place, family
from pipeline.config.sweep import Sweep
from pipeline.store.rows import Cell, PredictedRow
from pipeline.sweep.grid import NOTHING, Drafter, DraftLength, ViewCell, draft_lengths, view_cells
from pipeline.sweep.predict import BASELINES, cell_of


class Pick(NamedTuple):
    """What is measured of one drafter."""

    drafter: str
    cell: ViewCell
    length: DraftLength


def configured_picks(sweep: Sweep, drafters: Sequence[Drafter], context: str) -> list[Pick]:
    """The cells that the config names for measuring, of every baseline too."""
    measure = sweep.measure
    return [
        Pick(drafter.name, cell, length)
        for drafter in drafters
        if drafter.baseline or chosen_drafter(drafter.name, measure.drafters)
        for cell in view_cells(sweep, drafter)
        if not cell.control and (cell == NOTHING or chosen(cell.budget, measure.budgets))
        for length in draft_lengths(sweep, context, drafter)
        if chosen(length.gamma, measure.gammas)
    ]


def chosen(value: object, selection: Sequence[object]) -> bool:
    """Whether a value is in a selection; an empty selection takes everything."""
    return not selection or value in selection


def chosen_drafter(name: str, selection: Sequence[str]) -> bool:
    """As `chosen`; naming a variant takes the drafters of all its seeds."""
    return chosen(name, selection) or family(name) in selection


BEST_PREDICTED = 3  # cells of a data set and context that are measured for being the fastest by prediction

FASTEST_MEASURED = 3  # of those that are measured again

# Folders of the sweep: a run-off picks one of them, and the fresh repeats behind it say how fast that is.
MEASURED_AGAIN = ("run_off", "rechecked")

# Each with so many times the repeats of the first measurement: these cells lie close together, and a clock
# that others disturb would order them by luck.
REPEATS_AGAIN = 4


def by_place(rows: Iterable[PredictedRow]) -> dict[Place, list[PredictedRow]]:
    """Fastest first."""
    places: dict[Place, list[PredictedRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.speedup):
        places[Place(row.dataset, row.context)].append(row)
    return dict(places)


def pick_of(cell: Cell) -> Pick:
    view = ViewCell(cell.policy, cell.budget, cell.control)
    return Pick(cell.drafter, view, DraftLength(cell.gamma, cell.threshold))


def worth_measuring(here: Sequence[PredictedRow], drafters: Sequence[str]) -> list[Cell]:
    """Of one place: the fastest by prediction, each baseline's fastest, the corners of the best plane.

    Args:
        here: predictions of one place, fastest first.
        drafters: those that may be deployed; of a variant with several training seeds the first alone, so
            that luck of the seed is not picked.
    """
    trained = [row for row in here if row.drafter in drafters and row.drafter not in BASELINES]
    chosen = list(trained[:BEST_PREDICTED])
    for name in BASELINES:
        chosen += [row for row in here if row.drafter == name][:1]
    if trained:
        best = trained[0]
        plane = [row for row in trained if (row.drafter, row.policy) == (best.drafter, best.policy)]
        budgets = sorted({row.budget for row in plane}, key=lambda b: float("inf") if b == "full" else b)
        gammas = sorted({row.gamma for row in plane})
        corners = {(b, g) for b in (budgets[0], budgets[-1]) for g in (gammas[0], gammas[-1])}
        chosen += [row for row in plane if (row.budget, row.gamma) in corners]
    return list(dict.fromkeys(cell_of(row) for row in chosen))


def first_seeds(drafters: Sequence[str]) -> list[str]:
    """Of every variant the drafter of its first training seed."""
    return list({family(drafter): drafter for drafter in reversed(drafters)}.values())


def has_plane(sweep: Sweep, place: Place) -> bool:
    plane = sweep.measure.plane
    return plane is not None and (plane.dataset, plane.context) == place


def plane_picks(sweep: Sweep, place: Place, drafters: Sequence[str]) -> list[Pick]:
    """The plane that scores predictions, where this is its place: every budget and γ of one drafter."""
    plane = sweep.measure.plane
    if plane is None or not has_plane(sweep, place):
        return []
    name = next(drafter for drafter in drafters if chosen_drafter(drafter, [plane.drafter]))
    return [
        Pick(name, ViewCell(sweep.policies[0], budget, None), DraftLength(gamma))
        for budget in sweep.budgets
        for gamma in sweep.gammas_of(place.context)
    ]
