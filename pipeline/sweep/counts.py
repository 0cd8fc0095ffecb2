"""What a sweep comes to: its cells, its rows and its timed runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.axes import Place
from pipeline.config.schema import Config
from pipeline.store.layout import MEASURED_AGAIN
from pipeline.sweep.grid import can_replay, cells_at, draft_sources, texts
from pipeline.sweep.make_rows import at_chance
from pipeline.sweep.picks import (
    FASTEST_MEASURED,
    REPEATS_AGAIN,
    batches,
    measures_again,
    most_timed,
    picks_at,
    timed_temperatures,
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
        plain = len({pick.drafter for pick in picks})  # each source has its own autoregressive runs
        first = len(timed_chances) * (len(picks) + plain)
        again = len(MEASURED_AGAIN) * REPEATS_AGAIN * (fastest + min(fastest, plain))
        runs += len(together) * measure.repeats * (first + again)
    return SweepCounts(cells, replayed, measured, rechecked, runs)
