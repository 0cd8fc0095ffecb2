"""Which cells of a sweep are timed: by config, by prediction, on a plane, once more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pipeline.axes import NOTHING, Cell, Place, View, budget_order, family
from pipeline.config.sweep import Sweep
from pipeline.store.rows import PredictedRow
from pipeline.sweep.grid import Drafter, cells_behind, views_of
from pipeline.sweep.predict import BASELINES


def configured_picks(sweep: Sweep, drafters: Sequence[Drafter], place: Place) -> list[Cell]:
    """The cells that the config names for measuring, of every baseline too."""
    measure = sweep.measure
    return [
        cell
        for drafter in drafters
        if drafter.baseline or chosen_drafter(drafter.name, measure.drafters)
        for view in views_of(sweep, drafter)
        if not view.control and (view == NOTHING or chosen(view.budget, measure.budgets))
        for cell in cells_behind(sweep, drafter, place, view)
        if chosen(cell.gamma, measure.gammas)
    ]


def chosen(value: object, selection: Sequence[object]) -> bool:
    """Whether a value is in a selection; an empty selection takes everything."""
    return not selection or value in selection


def chosen_drafter(name: str, selection: Sequence[str]) -> bool:
    """As `chosen`; naming a variant takes the drafters of all its seeds."""
    return chosen(name, selection) or family(name) in selection


BEST_PREDICTED = 3  # cells of a data set and context that are measured for being the fastest by prediction

FASTEST_MEASURED = 3  # of those that are measured again

# Each with so many times the repeats of the first measurement: these cells lie close together, and a clock
# that others disturb would order them by luck.
REPEATS_AGAIN = 4


def by_place(rows: Iterable[PredictedRow]) -> dict[Place, list[PredictedRow]]:
    """Fastest first."""
    places: dict[Place, list[PredictedRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.speedup.mean):
        places[row.cell.place].append(row)
    return dict(places)


def worth_measuring(here: Sequence[PredictedRow], drafters: Sequence[str]) -> list[Cell]:
    """Of one place: the fastest by prediction, each baseline's fastest, the corners of the best plane.

    Args:
        here: predictions of one place, fastest first.
        drafters: those that may be deployed; of a variant with several training seeds the first alone, so
            that luck of the seed is not picked.
    """
    cells = [row.cell for row in here]
    trained = [cell for cell in cells if cell.drafter in drafters and cell.drafter not in BASELINES]
    chosen = list(trained[:BEST_PREDICTED])
    for name in BASELINES:
        chosen += [cell for cell in cells if cell.drafter == name][:1]
    if trained:
        best = trained[0]
        same = (best.drafter, best.view.policy)
        plane = [cell for cell in trained if (cell.drafter, cell.view.policy) == same]
        budgets = sorted({cell.view.budget for cell in plane}, key=budget_order)
        gammas = sorted({cell.gamma for cell in plane})
        corners = {(b, g) for b in (budgets[0], budgets[-1]) for g in (gammas[0], gammas[-1])}
        chosen += [cell for cell in plane if (cell.view.budget, cell.gamma) in corners]
    return list(dict.fromkeys(chosen))


def first_seeds(drafters: Sequence[str]) -> list[str]:
    """Of every variant the drafter of its first training seed."""
    return list({family(drafter): drafter for drafter in reversed(drafters)}.values())


def has_plane(sweep: Sweep, place: Place) -> bool:
    plane = sweep.measure.plane
    return plane is not None and (plane.dataset, plane.context) == place


def plane_picks(sweep: Sweep, place: Place, drafters: Sequence[Drafter]) -> list[Cell]:
    """The plane that scores predictions, where this is its place: every budget and γ of one drafter."""
    plane = sweep.measure.plane
    if plane is None or not has_plane(sweep, place):
        return []
    chosen = next(one for one in drafters if chosen_drafter(one.name, [plane.drafter]))
    return [
        cell
        for budget in sweep.budgets
        for cell in cells_behind(sweep, chosen, place, View(sweep.policies[0], budget))
        if not cell.threshold
    ]
