"""What the gate says of two evidences, cell by cell and together."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from pydantic import model_validator

from pipeline.config.gate import GateConfig
from pipeline.gate.bounds import Bounds, Outcome, Verdict, bounds, outcomes, units_needed, verdict
from pipeline.gate.evidence import Evidence
from pipeline.gate.pairs import (
    BASELINE,
    CANDIDATE,
    Metric,
    Paired,
    acceptance_pairs,
    both_sides,
    check_comparable,
    place,
    speed_pairs,
    sums,
)
from pipeline.intervals import Interval
from pipeline.results.axes import Cells
from pipeline.results.differences import Resampling, paired_rows, pooled_difference
from pipeline.results.speed import clock_units
from pipeline.store import old_rows
from pipeline.store.rows import OfCell


class GatedCell(OfCell):
    """One cell of both sides, by acceptance or by speed.

    `name` says the cell in words. `candidate` and `baseline` are acceptance rates, or decode speedups over
    autoregressive decoding (geometric means over prompts). `difference` is candidate − baseline; of speed,
    candidate ÷ baseline − 1. `floor` is the least that is tolerated. `low` is a lower bound that holds alone,
    `high` an upper bound that holds together with those of all cells; None over too few documents.
    `documents_needed` is how many documents would decide an open cell if its true difference is the observed
    one, `documents_if_equal` how many if there is no difference; None where no number would. `not_looping`
    is the difference without looping prompts, `other_prompt` that of the control, with 95 % intervals; None
    of speed, and where there are no such rows.
    """

    name: str
    metric: Metric
    candidate: float
    baseline: float
    difference: float
    floor: float
    low: float | None
    high: float | None
    num_prompts: int
    num_documents: int
    num_looping: int
    outcome: Outcome
    documents_needed: int | None
    documents_if_equal: int | None
    not_looping: Interval | None
    other_prompt: Interval | None

    @model_validator(mode="before")
    @classmethod
    def _of_candidate(cls, data: Any) -> Any:
        """Rows of earlier formats do not name the drafter: theirs is the candidate's cell."""
        if isinstance(data, dict) and not data.keys() & {"cell", "drafter"}:
            return old_rows.as_today({"drafter": CANDIDATE, **data})
        return data


class Comparison(NamedTuple):
    """The verdict, the reasons for it in words, and all cells."""

    verdict: Verdict
    reasons: list[str]
    cells: list[GatedCell]


def compare(candidate: Evidence, baseline: Evidence, config: GateConfig) -> Comparison:
    """Pair all cells at the gate's γ and temperatures, and judge them together.

    Raises:
        BadData: if the two were not evaluated alike: names what differs.
    """
    check_comparable(candidate, baseline)
    cells = both_sides(candidate, baseline)
    pairs, obstacle = acceptance_pairs(cells, config), ""
    if config.margins.speed is not None:
        timed, obstacle = speed_pairs(candidate, baseline, config)
        # Documents whose prompts were decoded in one batch share its clock: together they are one unit.
        linked = clock_units(row for side in (candidate, baseline) for row in side.rows if row.timing)
        pairs = [replace(p, units=[linked.get(unit, unit) for unit in p.units]) for p in pairs + timed]
    pairs.sort(key=lambda pair: pair.key.dataset)
    cell_bounds = bounds(
        [sums(list(stratum)) for _, stratum in groupby(pairs, key=lambda pair: pair.key.dataset)],
        samples=config.bootstrap_samples,
        seed=config.seed,
        error_rate=config.error_rate,
    )
    judged = outcomes(cell_bounds, np.array([pair.floor for pair in pairs]))
    gated = [
        gated_cell(pair, cells, config, cell_bounds, number, outcome)
        for number, (pair, outcome) in enumerate(zip(pairs, judged, strict=True))
    ]
    said = verdict([cell.outcome for cell in gated])
    if obstacle and said == "pass":
        said = "not_enough_evidence"
    return Comparison(said, reasons(gated, said, obstacle, config), gated)


def gated_cell(
    pair: Paired, cells: Cells, config: GateConfig, bounds: Bounds, number: int, outcome: Outcome
) -> GatedCell:
    """One cell's row; over too few documents it is open, whatever its bounds."""
    units = len(set(pair.units))
    enough = units >= config.least_documents
    needed: list[int | None] = [None, None]
    if not enough:
        outcome = "open"
    if outcome == "open":
        assumed = float(bounds.difference[number]), 0.0
        needed = [units_needed(bounds, number, true, pair.floor, units) for true in assumed]
        needed = [most and max(most, config.least_documents) for most in needed]
    candidate, baseline = pair.rates()
    comparisons: list[Interval | None] = [None, None]
    if pair.metric == "acceptance":
        keys = [pair.key, pair.key.vary(drafter=BASELINE)]
        controls = [key.vary(control="other_prompt") for key in keys]
        resampling = Resampling(config.bootstrap_samples, config.seed)
        comparisons = [
            pooled_difference(shared, resampling) if shared else None
            for shared in (paired_rows(cells, keys, True), paired_rows(cells, controls, False))
        ]
    return GatedCell(
        cell=pair.key,
        name=place(pair.key),
        metric=pair.metric,
        candidate=candidate,
        baseline=baseline,
        difference=pair.shown(float(bounds.difference[number])),
        floor=pair.shown(pair.floor),
        low=pair.shown(float(bounds.low[number])) if enough else None,
        high=pair.shown(float(bounds.high[number])) if enough else None,
        num_prompts=pair.num_prompts,
        num_documents=units,
        num_looping=sum(row.looping for row in pair.rows),
        outcome=outcome,
        documents_needed=needed[0],
        documents_if_equal=needed[1],
        not_looping=comparisons[0],
        other_prompt=comparisons[1],
    )


def reasons(cells: list[GatedCell], said: Verdict, obstacle: str, config: GateConfig) -> list[str]:
    """Why the verdict is what it is, a sentence each."""
    sentences = [f"Speed is asked for and cannot be compared: {obstacle}."] if obstacle else []
    if said == "fail":
        worse = [cell for cell in cells if cell.outcome == "fail"]
        sentences.append(f"{len(worse)} of {len(cells)} cells are below what is tolerated.")
        return sentences + [f"{cell.metric} in {cell.name}: {in_words(cell)}." for cell in worse]
    opened = [cell for cell in cells if cell.outcome == "open"]
    if not opened:
        return [*sentences, f"All {len(cells)} cells are above what is tolerated."]
    sentences.append(f"{len(opened)} of {len(cells)} cells are undecided.")
    few = [cell for cell in opened if cell.num_documents < config.least_documents]
    if few:
        least = min(cell.num_documents for cell in few)
        sentences.append(
            f"{len(few)} of them have too few documents: {least} of at least {config.least_documents}."
        )
    return [*sentences, *enough_prompts(opened)]


def enough_prompts(opened: list[GatedCell]) -> list[str]:
    """How many prompts would decide.

    One cell below its floor fails the candidate: the cheapest of them decides. If none is below, all have to
    pass: the dearest of them decides.
    """
    sentences = []
    known = [(cell.documents_needed, cell) for cell in opened if cell.documents_needed is not None]
    below = [(needed, cell) for needed, cell in known if cell.difference < cell.floor]
    if known:
        by_number = itemgetter(0)
        needed, cell = min(below, key=by_number) if below else max(known, key=by_number)
        sentences.append(
            f"If the differences are truly as observed, {many(needed, cell)} would be enough to decide with "
            f"a chance of at least 80 %; now there are {cell.num_prompts} of {cell.num_documents} "
            f"({cell.name})."
        )
    else:
        sentences.append("Their differences equal what is tolerated: no number of prompts decides that.")
    equal = [(cell.documents_if_equal, cell) for cell in opened if cell.documents_if_equal is not None]
    if equal:
        needed, cell = max(equal, key=itemgetter(0))
        sentences.append(f"If candidate and baseline are truly equal, {many(needed, cell)} would be.")
    return sentences


def many(needed: int, cell: GatedCell) -> str:
    """A number of documents in words, with as many prompts each as the cell has now."""
    prompts = -(-needed * cell.num_prompts // cell.num_documents)
    if prompts > 1_000_000:
        return "over a million prompts"
    return f"about {prompts:,} prompts of {needed:,} documents"


def in_words(cell: GatedCell) -> str:
    """A difference and the bound that decides against it."""
    unit = "points" if cell.metric == "acceptance" else "%"
    assert cell.high is not None
    return (
        f"{100 * cell.difference:+.1f} {unit}, at most {100 * cell.high:+.1f}, where "
        f"{100 * cell.floor:+.1f} is tolerated"
    )
