"""What a sweep comes to: its cells, its rows and its timed runs."""

from __future__ import annotations

from collections.abc import Mapping, Set
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
    """Rows are one a prompt, cell and text.

    At most: a prompt whose continuation ends at once has none, and none has `other_prompt` where there is no
    other document. Where speed is predicted, as many cells are measured beside the named ones as predictions
    can point at; those are among the replayed ones.

    Args:
        prompts: of the test split.
    """
    sweep, measure, sources = config.sweep, config.sweep.measure, draft_sources(config)
    chances, timed_chances = texts(sweep, sweep.temperatures), texts(sweep, timed_temperatures(sweep))
    cells = replayed = measured = rechecked = runs = 0
    for place, count in prompts.items():
        swept = [cell for source in sources for cell in cells_at(sweep, source, place)]
        replaying = {at_chance(cell, c) for cell in swept for c in chances if can_replay(cell, c)}
        if sweep.mode == "measure":
            replaying = set()
        replayed += count * len(replaying)
        if sweep.mode == "replay":
            cells += len(replaying)
            continue
        named = picks_at(sweep, sources, place)
        cells += len(replaying | {at_chance(pick, chance) for pick in named for chance in timed_chances})
        picks, names = timed_at(config, place)
        together = batches(measure, count)
        timed = sum(last - first for first, last in together)
        fastest = min(FASTEST_MEASURED, picks) if measures_again(sweep) else 0
        measured += timed * picks * len(timed_chances)
        rechecked += timed * len(MEASURED_AGAIN) * fastest
        # Autoregressive decoding is timed with each draft source.
        first = len(timed_chances) * (picks + len(names))
        again = len(MEASURED_AGAIN) * REPEATS_AGAIN * (fastest + min(fastest, len(names)))
        runs += len(together) * measure.repeats * (first + again)
    return SweepCounts(cells, replayed, measured, rechecked, runs)


def timed_at(config: Config, place: Place) -> tuple[int, set[str]]:
    """How many cells are timed in a place at most, and of which draft sources."""
    named = set(picks_at(config.sweep, draft_sources(config), place))
    added, others = pointed_at(config, place, named) if config.sweep.predicts else (0, [])
    return len(named) + added, {pick.drafter for pick in named}.union(others)


def pointed_at(config: Config, place: Place, named: Set[Cell]) -> tuple[int, list[str]]:
    """The most that predictions can add to the named cells of a place.

    `worth_measuring` is asked what it takes of made-up predictions: once for every plane, as if one of its
    cells were the fastest, and next to it those that add most.

    Returns:
        How many cells, and the draft sources of which no cell is named.
    """
    sources = {source.name: source for source in draft_sources(config)}
    names = first_seeds(list(sources))
    swept = [cell for name in names for cell in cells_at(config.sweep, sources[name], place)]
    cells = [cell for cell in swept if not cell.control and not cell.threshold]
    timed: set[str] = {pick.drafter for pick in named}
    most: set[Cell] = set()
    for plane in dict.fromkeys(map(plane_of, cells)):
        own = [cell for cell in cells if plane_of(cell) == plane]
        if sources[own[0].drafter].baseline:
            continue
        taken = {*named, *corners(own)}
        free = [cell for cell in cells if cell not in taken]
        fastest = [*(cell for cell in own if cell not in taken), own[0]][0]
        # One of each source that is not timed yet, before a second one of any.
        others = {one.drafter: one for one in reversed(free) if one.drafter not in {own[0].drafter, *timed}}
        order = dict.fromkeys([fastest, *others.values(), *free, *cells])
        added = set(worth_measuring(list(order), names)) - named
        most = max(most, added, key=lambda picks: (len(picks), len({pick.drafter for pick in picks} - timed)))
    return len(most), sorted({pick.drafter for pick in most} - timed)
