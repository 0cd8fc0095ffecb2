"""What a sweep comes to: its cells, its rows, its timed runs, and what models read for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pipeline.axes import Place
from pipeline.config.models import Role
from pipeline.config.schema import Config
from pipeline.models.shape import Reading
from pipeline.store.layout import MEASURED_AGAIN
from pipeline.sweep.grid import can_replay, cells_at, draft_sources, texts, views_of
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


def replay_readings(config: Config, prompts: Mapping[Place, int]) -> Iterator[Reading]:
    """Each draft source reads every prompt, and the texts behind it once for each of its views.

    The drafter of a cascade reads the prompts too, and the target those that a head reads features of.
    """
    sweep, data = config.sweep, config.data
    for source in draft_sources(config) if sweep.mode != "measure" else ():
        if source.role is None:
            continue
        texts_behind = len(views_of(sweep, source)) * len(texts(sweep, sweep.temperatures))
        for place, count in prompts.items():
            tokens = data.context_tokens[place.context]
            yield Reading(source.role, count * (tokens + texts_behind * data.max_new_tokens), tokens / 2)
            if source.kind == "cascade":
                yield Reading("drafter", count * tokens, tokens / 2)
            if source.kind == "head":
                yield Reading("target", count * tokens, tokens / 2)


def timed_readings(config: Config, prompts: Mapping[Place, int]) -> Iterator[Reading]:
    """The timed prompts are read by the target, by each drafter, that of a cascade too, and once more by a
    target that drafts. Each reading is done twice, as only the second is timed.

    Where the fastest cells are measured again, the target reads the prompts each time, and so do the largest
    sources, as many as there can be cells.
    """
    for place, count in prompts.items():
        names = {cell.drafter for cell in most_timed(config, place)}
        sources = [source for source in draft_sources(config) if source.name in names]
        drafting = [source.role for source in sources if source.role == "target"][:1]  # once for all of these
        drafters: list[Role] = [
            "drafter" for source in sources if source.role == "drafter" or source.kind == "cascade"
        ]
        readers = [*drafting, *drafters]
        again = len(MEASURED_AGAIN) * measures_again(config.sweep)
        tokens, timed = config.data.context_tokens[place.context], min(count, config.sweep.measure.prompts)
        for role in ("target", *readers, *again * ["target", *readers[:FASTEST_MEASURED]]):
            yield Reading(role, 2 * timed * tokens, tokens / 2)
