"""What a sweep comes to: its rows and timed runs, and the memory of replaying and of measuring.

Prompts are taken to be as long as the longest context, and the cells that predictions point at to be as many
as they can be. Memory is no upper bound all the same: what libraries hold beside the tensors is not in it,
and a process that measured on a CPU took an eighth more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from itertools import chain
from typing import NamedTuple

from pipeline.axes import Cell, Place, budget_order
from pipeline.config.schema import Config
from pipeline.config.sweep import Sweep
from pipeline.store.layout import MEASURED_AGAIN
from pipeline.sweep.grid import Drafter, cells_behind, views_of
from pipeline.sweep.picks import (
    BEST_PREDICTED,
    FASTEST_MEASURED,
    REPEATS_AGAIN,
    chosen,
    chosen_drafter,
    configured_picks,
    first_seeds,
    plane_picks,
)


def draft_sources(config: Config) -> list[Drafter]:
    """What the sweep evaluates, without the models: the chosen drafters, then the baselines."""
    names = [drafter.name for drafter in config.train.drafters]
    chosen = [Drafter(name, None, 0) for name in names if chosen_drafter(name, config.sweep.drafters)]
    return chosen + [Drafter(name, None, 0, name) for name in config.sweep.baselines]


def role_of(source: Drafter) -> str | None:
    """Whose shape a source's model has; one without a model has none."""
    return {None: "drafter", "self_speculation": "target"}.get(source.baseline)


def texts(sweep: Sweep, temperatures: Iterable[float]) -> tuple[int, int]:
    """Greedy and sampled continuations of one prompt at these temperatures."""
    greedy = [temperature == 0 for temperature in temperatures]
    return sum(greedy), (len(greedy) - sum(greedy)) * len(sweep.seeds)


def measured_again(sweep: Sweep) -> bool:
    """Whether the fastest cells are: they are found among greedy rows."""
    return sweep.predicts and chosen(0.0, sweep.measure.temperatures)


# ── counts ────────────────────────────────────────────────────────────────────────────────────────


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


def unranked(config: Config) -> str:
    """Why no measured cell will be recommended, where that is certain beforehand; else ""."""
    measure, least = config.sweep.measure, config.report.least_documents
    most = math.ceil(min(config.data.prompts, measure.prompts) / measure.prompts_together)
    if config.sweep.mode == "replay" or most >= least:
        return ""
    return (
        f"sweep.measure.prompts = {measure.prompts}, {measure.prompts_together} decoded together, is at most "
        f"{most} documents with a clock of their own, and report.least_documents is {least}: nothing will be "
        "recommended"
    )


def count_sweep(config: Config, prompts: Mapping[Place, int]) -> SweepCounts:
    """Rows are one a prompt, cell and text: drafters × views × lengths × texts.

    At most: a prompt whose continuation ends at once has none, and none has `other_prompt` where there is no
    other document. Thresholds are replayed on greedy text only. Where speed is predicted, as many cells are
    measured beside the named ones as predictions can point at.

    Args:
        prompts: of the test split.
    """
    sweep, measure = config.sweep, config.sweep.measure
    greedy, sampled = texts(sweep, sweep.temperatures)
    timed_greedy, timed_sampled = texts(sweep, measure.temperatures or sweep.temperatures)
    timed_texts = timed_greedy + timed_sampled
    replayed_cells = measured_cells = decoded_cells = replayed = measured = rechecked = runs = 0
    for place, count in prompts.items():
        for source in draft_sources(config):
            behind = (cells_behind(sweep, source, place, view) for view in views_of(sweep, source))
            swept = list(chain.from_iterable(behind))
            here = greedy * len(swept) + sampled * sum(not cell.threshold for cell in swept)
            replayed_cells, replayed = replayed_cells + here, replayed + count * here
        picks, timed = picks_of(config, place), min(count, measure.prompts)
        added, others = pointed_at(config, place, set(picks)) if sweep.predicts else (0, [])
        cells = len(picks) + added
        fastest = min(FASTEST_MEASURED, cells) if measured_again(sweep) else 0
        measured_cells += cells * timed_texts
        decoded_cells += timed_sampled * sum(pick.threshold > 0 for pick in picks)  # not replayed
        measured += timed * cells * timed_texts
        rechecked += timed * len(MEASURED_AGAIN) * fastest
        # Autoregressive decoding is timed with each draft source.
        sources = len({pick.drafter for pick in picks}.union(others))
        first = timed_texts * (cells + sources)
        later = len(MEASURED_AGAIN) * REPEATS_AGAIN * (fastest + min(fastest, sources))
        batches = math.ceil(timed / measure.prompts_together)
        runs += batches * measure.repeats * (first + later)
    if sweep.mode == "replay":
        return SweepCounts(replayed_cells, replayed, 0, 0, 0)
    if sweep.mode == "measure":
        return SweepCounts(measured_cells, 0, measured, rechecked, runs)
    return SweepCounts(replayed_cells + decoded_cells, replayed, measured, rechecked, runs)


def picks_of(config: Config, place: Place) -> list[Cell]:
    """What is measured whatever is predicted."""
    sources = draft_sources(config)
    picks = configured_picks(config.sweep, sources, place)
    return list(dict.fromkeys(picks + plane_picks(config.sweep, place, sources)))


def pointed_at(config: Config, place: Place, named: Set[Cell]) -> tuple[int, list[str]]:
    """The most that `pipeline.sweep.picks.worth_measuring` can add to the named cells of a place.

    Returns:
        How many cells, and draft sources of which no cell is named: those of trained drafters, which have
        one shape, are the first of those that it can be.
    """
    sweep = config.sweep
    sources = {source.name: source for source in draft_sources(config)}
    budgets = sorted(sweep.budgets, key=budget_order)
    gammas = sorted(sweep.gammas_of(place.context))
    corner = {(b, g) for b in (budgets[0], budgets[-1]) for g in (gammas[0], gammas[-1])}
    unnamed: set[Cell] = set()  # of trained drafters
    corners, baselines = 0, []
    for name in first_seeds(list(sources)):
        views = [view for view in views_of(sweep, sources[name]) if not view.control]
        cells = {
            cell
            for view in views
            for cell in cells_behind(sweep, sources[name], place, view)
            if not cell.threshold
        }
        if sources[name].baseline:
            baselines += [] if cells <= named else [name]
            continue
        for policy in sweep.policies:
            ends = {cell for cell in cells if cell.policy == policy and (cell.budget, cell.gamma) in corner}
            corners = max(corners, len(ends - named))
        unnamed |= cells - named
    best = min(BEST_PREDICTED, len(unnamed) - corners)
    timed = {pick.drafter for pick in named}
    new = sorted({pick.drafter for pick in unnamed} - timed)[:BEST_PREDICTED]
    return corners + best + len(baselines), new + [name for name in baselines if name not in timed]


# ── memory ────────────────────────────────────────────────────────────────────────────────────────


def longest(config: Config) -> int:
    return max(context.tokens for context in config.data.contexts)
