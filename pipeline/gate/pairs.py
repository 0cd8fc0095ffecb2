"""Two evidences side by side: the cells that both hold, prompt by prompt, as ratios to compare."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np

from pipeline.axes import Cell, budget_order, view_text
from pipeline.config.gate import GateConfig
from pipeline.errors import BadData
from pipeline.gate.evidence import Evidence
from pipeline.intervals import Floats
from pipeline.metrics import Number
from pipeline.results.axes import Cells, PromptRows
from pipeline.results.differences import paired_rows
from pipeline.results.pool import accepted_of_proposed, documents, group, replayed_or_measured
from pipeline.results.speed import decoded
from pipeline.store.rows import PromptRow, Timing

Metric = Literal["acceptance", "speed"]
Ratio = tuple[Sequence[Number], Sequence[Number]]  # numerators and denominators, per prompt
SIDES = CANDIDATE, BASELINE = "candidate", "baseline"


@dataclass(frozen=True)
class Paired:
    """A cell of both sides over the same N prompts, or batches of prompts that were decoded together.

    `rows` [N] are the candidate's (of a batch the first), `units` [N] the name of the unit that each is
    resampled with. The ratios pool to acceptance rates, or to mean logarithms of decode speedups; `floor` is
    the least difference that is tolerated on that scale.
    """

    key: Cell
    metric: Metric
    floor: float
    num_prompts: int
    rows: Sequence[PromptRow]
    units: Sequence[str]
    candidate: Ratio
    baseline: Ratio

    def shown(self, value: float) -> float:
        """A difference, or bound of one, as users read it: of speed, candidate ÷ baseline − 1."""
        return math.expm1(value) if self.metric == "speed" else value

    def rates(self) -> tuple[float, float]:
        """The acceptance rates of candidate and baseline, or the geometric means of their speedups."""
        candidate, baseline = (sum(above) / sum(below) for above, below in (self.candidate, self.baseline))
        return (math.exp(candidate), math.exp(baseline)) if self.metric == "speed" else (candidate, baseline)


def check_comparable(candidate: Evidence, baseline: Evidence) -> None:
    """Raise BadData where the two were evaluated behind different targets, or on different prompts."""
    for field, what in (("target", "another target or tokenizer"), ("prompts", "other prompts")):
        candidate_value, baseline_value = getattr(candidate, field), getattr(baseline, field)
        if candidate_value != baseline_value:
            raise BadData(
                f"the candidate {candidate.drafter} ({candidate.config}) was evaluated with {what} than the "
                f"baseline {baseline.drafter} ({baseline.config}), by fingerprint {candidate_value} and "
                f"{baseline_value}: evaluate both alike"
            )


def both_sides(candidate: Evidence, baseline: Evidence) -> Cells:
    """The rows of both sides that have an acceptance, controls included, by cell and prompt."""
    return {
        by_side(key, side): rows
        for side, evidence in zip(SIDES, (candidate, baseline), strict=True)
        for key, rows in replayed_or_measured(evidence.rows).items()
    }


def acceptance_pairs(cells: Cells, config: GateConfig) -> list[Paired]:
    """All cells of the gate's γ and temperatures, over the prompts that propose something.

    Both sides propose in the same prompts: the texts are the target's.

    Raises:
        BadData: if the sides do not hold the same cells and prompts; names one that differs.
    """
    pairs = []
    for key in common_keys(cells, config):
        other = key.vary(drafter=BASELINE)
        if differing := cells[key].keys() ^ cells[other].keys():
            raise BadData(
                f"only one side has prompt {min(differing)!r} in {place(key)} ({len(differing)} prompts "
                "differ): run the sweep that lacks them again"
            )
        sides = paired_rows(cells, [key, other], without_looping=False)
        if not sides:
            raise BadData(f"no prompt of {place(key)} proposes anything: evaluate longer continuations")
        ratios = [accepted_of_proposed(side) for side in sides]
        floor = -config.margins.acceptance
        rows = sides[0]
        pairs.append(Paired(key, "acceptance", floor, len(rows), rows, documents(rows), *ratios))
    return pairs


def common_keys(cells: Cells, config: GateConfig) -> list[Cell]:
    """The candidate's keys of the cells to compare, ordered; BadData where the baseline has others."""
    for name, wanted in (("gamma", config.gammas), ("temperature", config.temperatures)):
        there = sorted({getattr(key, name) for key in cells})
        for value in wanted:
            if value not in there:
                raise BadData(
                    f"nothing was evaluated at {name} {value:g}, which the gate compares: only {there}"
                )
    candidate_keys, baseline_keys = (
        {key.vary(drafter=CANDIDATE) for key in cells if key.drafter == side and compared(key, config)}
        for side in SIDES
    )
    if differing := candidate_keys ^ baseline_keys:
        first = min(differing, key=order)
        side = BASELINE if first in candidate_keys else CANDIDATE
        raise BadData(
            f"the {side} was not evaluated in {place(first)} ({len(differing)} cells differ): evaluate both "
            "in the same cells"
        )
    return sorted(candidate_keys, key=order)


def speed_pairs(candidate: Evidence, baseline: Evidence, config: GateConfig) -> tuple[list[Paired], str]:
    """Cells that both sides measured, over the prompts that they have in common; and why there are none."""
    for side, evidence in zip(SIDES, (candidate, baseline), strict=True):
        if not evidence.hardware:
            return [], f"no speed of the {side} was measured"
    if candidate.hardware != baseline.hardware:
        return [], (
            f"the candidate's speed was measured on {candidate.hardware}, the baseline's on "
            f"{baseline.hardware}: measure both on the same hardware"
        )
    candidate_speeds, baseline_speeds = (
        {by_side(key, CANDIDATE): speedups(rows) for key, rows in group(evidence.rows, "measure").items()
         if compared(key, config)}
        for evidence in (candidate, baseline)
    )  # fmt: skip
    assert config.margins.speed is not None
    floor = math.log1p(-config.margins.speed)
    pairs = []
    for key in sorted(candidate_speeds.keys() & baseline_speeds.keys(), key=order):
        sides = candidate_speeds[key], baseline_speeds[key]
        batches = sorted(sides[0].keys() & sides[1].keys())
        rows = [sides[0][batch][0] for batch in batches]
        logs = [[math.log(side[batch][1]) for batch in batches] for side in sides]
        if batches:
            ratios = [(values, [1] * len(batches)) for values in logs]
            prompts = sum(map(len, batches))
            pairs.append(Paired(key, "speed", floor, prompts, rows, documents(rows), *ratios))
    return (
        pairs,
        "" if pairs else "no cell and prompt of the gate's γ and temperatures was measured on both sides",
    )


def speedups(rows: PromptRows) -> dict[tuple[str, ...], tuple[PromptRow, float]]:
    """Ids of prompts that were decoded together → their first row, and their decode speedup over AR."""
    batches: dict[str, list[tuple[PromptRow, Timing]]] = defaultdict(list)
    for row in rows.values():
        if row.timing is not None:
            batches[row.batch].append((row, row.timing))
    speedup_by_prompts = {}
    for batch in batches.values():
        ours = sum(decoded(row) for row, _ in batch) / sum(median(timing.decode_s) for _, timing in batch)
        plain = sum(timing.ar_num_tokens for _, timing in batch) / sum(
            median(timing.ar_decode_s) for _, timing in batch
        )
        prompts = tuple(sorted(row.prompt_id for row, _ in batch))
        speedup_by_prompts[prompts] = batch[0][0], ours / plain
    return speedup_by_prompts


def sums(pairs: Sequence[Paired]) -> Floats:
    """[U units, K cells, S sides, R numerator and denominator] sums over each unit's prompts in each cell."""
    names = sorted({unit for pair in pairs for unit in pair.units})
    number = {unit: index for index, unit in enumerate(names)}
    sums_UKSR = np.zeros((len(number), len(pairs), 2, 2))
    for cell, pair in enumerate(pairs):
        members = [number[unit] for unit in pair.units]
        for side, ratio in enumerate((pair.candidate, pair.baseline)):
            for part, values in enumerate(ratio):
                np.add.at(sums_UKSR[:, cell, side, part], members, values)
    return sums_UKSR


def by_side(key: Cell, side: str) -> Cell:
    """A cell with the side as its drafter, as both drafters may have one name; seed 0 if it is greedy."""
    return key.vary(drafter=side, seed=key.seed if key.temperature else 0)


def compared(key: Cell, config: GateConfig) -> bool:
    return (
        key.control is None
        and not key.lossy
        and not key.threshold
        and key.gamma in config.gammas
        and key.temperature in config.temperatures
    )


def order(key: Cell) -> tuple[str | float, ...]:
    at = budget_order(key.budget)
    return key.dataset, key.context, key.policy, key.gamma, key.temperature, key.seed, at


def place(key: Cell) -> str:
    """A cell in words."""
    sampling = f", temperature {key.temperature:g}, seed {key.seed}" if key.temperature else ""
    return f"{key.dataset}, context {key.context}, {view_text(key.view)}, γ = {key.gamma}{sampling}"
