"""What a sweep comes to: its cells, its rows and its timed runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.axes import Cell, Place
from pipeline.config.schema import Config
from pipeline.store.layout import MEASURED_AGAIN
from pipeline.sweep.grid import can_replay, cells_at, draft_sources, texts
from pipeline.sweep.make_rows import at_chance
from pipeline.sweep.picks import (
    FASTEST_MEASURED,
    REPEATS_AGAIN,
    batches,
    corners,
    first_seeds,
    measures_again,
    picks_at,
    plane_of,
    timed_temperatures,
    worth_measuring,
)


class SweepCounts(NamedTuple):
    """Cells, and rows of replay, of measuring, and of measuring the fastest cells again.

    `runs` are those that are timed for the last two, the autoregressive ones included; prompts that are
    decoded together share a run.
    """

    cells: int
    replayed: int
    measured: int
    rechecked: int
    runs: int


def count_sweep(config: Config, prompts: Mapping[Place, int]) -> SweepCounts:
    """Rows are one for each prompt, cell and text.

    The counts are the most there can be: a prompt whose continuation ends at once has no rows, and without
    another document there are none of `other_prompt`. Where speed is predicted, the most cells that
    predictions can point at are measured beside the named ones; they are among the replayed cells.

    Args:
        prompts: of the test split.
    """
    sweep, measure, sources = config.sweep, config.sweep.measure, draft_sources(config)
    chances, timed_chances = texts(sweep, sweep.temperatures), texts(sweep, timed_temperatures(sweep))
    cells = replayed = measured = rechecked = runs = 0
    for place, count in prompts.items():
        replayers = sources if sweep.mode != "measure" else []
        swept = [cell for source in replayers for cell in cells_at(sweep, source, place)]
        replaying = {at_chance(cell, c) for cell in swept for c in chances if can_replay(cell, c)}
        replayed += count * len(replaying)
        if sweep.mode == "replay":
            cells += len(replaying)
            continue
        named, picks = picks_at(sweep, sources, place), most_timed(config, place)
        cells += len(replaying | {at_chance(pick, chance) for pick in named for chance in timed_chances})
        together = batches(measure, count)
        timed = sum(last - first for first, last in together)
        exact = sum(not pick.lossy for pick in picks)
        fastest = min(FASTEST_MEASURED, exact) if measures_again(sweep) else 0
        measured += timed * len(picks) * len(timed_chances)
        rechecked += timed * len(MEASURED_AGAIN) * fastest
        plain = len(
            {pick.drafter for pick in picks}
        )  # autoregressive decoding is timed with each draft source
        first = len(timed_chances) * (len(picks) + plain)
        again = len(MEASURED_AGAIN) * REPEATS_AGAIN * (fastest + min(fastest, plain))
        runs += len(together) * measure.repeats * (first + again)
    return SweepCounts(cells, replayed, measured, rechecked, runs)


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
