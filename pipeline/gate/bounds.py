"""Is a candidate worse than a baseline, no worse, or is that not known yet? The statistics; numpy only.

In each cell two pooled ratios are compared, candidate minus baseline, over the same units (documents). The
difference is compared with the least that is tolerated, its floor. Three outcomes:

- *fail*: the upper bound lies below the floor. One such cell fails the candidate, so the bounds of all cells
  hold at once: their width is a quantile of the largest deviation over all cells of a resample (max-T), in
  which cells that share documents count for less than as many independent ones.
- *pass*: the lower bound lies above the floor. A candidate passes only if every cell does. It is wrongly
  passed only if the cells that are truly below their floors all look above, which is no likelier than for one
  of them, so each bound holds alone and no correction is due (an intersection-union test).
- *open*: neither.

Both bounds use deviations without their sign. Differences of acceptance are skewed, since a few
looping texts that one drafter follows and the other does not weigh as much as many others, and one-sided
quantiles of a skewed sample are too small on one of the sides.

Shapes: U units, K cells, S sides (candidate, baseline), R parts of a ratio (above, below), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.intervals import Floats, draw_counts

Outcome = Literal["pass", "fail", "open"]
Verdict = Literal["pass", "fail", "not_enough_evidence"]
POWER = 0.8  # the least chance of a verdict with as many documents as `units_needed` says


class Bounds(NamedTuple):
    """[K] each. `low` lies `alone` errors below the difference, `high` lies `together` errors above it."""

    difference: Floats
    error: Floats
    alone: Floats
    together: Floats

    @property
    def low(self) -> Floats:
        return self.difference - self.alone * self.error

    @property
    def high(self) -> Floats:
        return self.difference + self.together * self.error


def bounds(strata: Sequence[Floats], *, samples: int, seed: int, error_rate: float) -> Bounds:
    """Bounds of all cells, one stratum after the other.

    Args:
        strata: per data set sums_UKSR over each unit's prompts; zeros where a unit is not in a cell. Units
            are drawn within their stratum, for all its cells at once.
        samples: resamples B.
        seed: of the resampling.
        error_rate: of the lower bound of any one cell, and of all upper bounds together.

    Raises:
        ValueError: if there is no cell, or one with a ratio whose denominator is 0.
    """
    if not strata or not all(sums.ndim == 4 and sums.shape[1:] == (sums.shape[1], 2, 2) for sums in strata):
        raise ValueError("every stratum must be [U, K, 2, 2], and there must be one")
    differences, errors, deviations = [], [], []
    for number, sums_UKSR in enumerate(strata):
        pooled_KSR = sums_UKSR.sum(axis=0)
        if not (pooled_KSR[..., 1] > 0).all():
            raise ValueError("a cell has nothing below its ratio: there is no rate")
        # A seed of its own: data sets with equally many units would else be resampled in step.
        counts_BU = draw_counts(len(sums_UKSR), samples, seed + number)
        drawn_BKSR = np.tensordot(counts_BU, sums_UKSR, axes=1)
        difference_K, drawn_BK = _difference(pooled_KSR), _difference(drawn_BKSR)
        error_K = np.nanstd(drawn_BK, axis=0)
        off_BK = np.abs(drawn_BK - difference_K)
        differences.append(difference_K)
        errors.append(error_K)
        # A cell whose units all agree has no spread to be off by.
        deviations.append(np.divide(off_BK, error_K, out=np.zeros_like(off_BK), where=error_K > 0))
    off_BK = np.concatenate(deviations, axis=1)
    alone_K = np.nanquantile(off_BK, 1 - error_rate, axis=0)
    # fmax passes over resamples that drew no unit of some cell.
    together = np.nanquantile(np.fmax.reduce(off_BK, axis=1), 1 - error_rate)
    return Bounds(
        np.concatenate(differences), np.concatenate(errors), alone_K, np.full(len(alone_K), together)
    )


def outcomes(cell_bounds: Bounds, floor_K: NDArray[np.float64]) -> list[Outcome]:
    """The outcome of each cell, where `floor_K` are the least differences that are tolerated."""
    return [
        "fail" if high < floor else "pass" if low > floor else "open"
        for low, high, floor in zip(cell_bounds.low, cell_bounds.high, floor_K, strict=True)
    ]


def verdict(cells: Sequence[Outcome]) -> Verdict:
    """The verdict of all cells together. No cell, no evidence."""
    if "fail" in cells:
        return "fail"
    return "pass" if cells and all(cell == "pass" for cell in cells) else "not_enough_evidence"


def units_needed(cell_bounds: Bounds, cell: int, difference: float, floor: float, units: int) -> int | None:
    """How many units a verdict takes that depends on this cell, if its true difference is `difference`.

    Below the floor the cell alone fails the candidate, with a chance of 80 %. Above it all K cells have to
    pass, for which each must miss with a chance of at most 20 % ÷ K. An error shrinks with the root of the
    number of units: n · ((width + z) · error ÷ |difference − floor|)². None where the difference is the
    floor: then no number is enough.
    """
    gap = difference - floor
    if gap == 0:
        return None
    width, misses = cell_bounds.together[cell], 1
    if gap > 0:
        width, misses = cell_bounds.alone[cell], len(cell_bounds.error)
    errors = (float(width) + NormalDist().inv_cdf(1 - (1 - POWER) / misses)) * float(cell_bounds.error[cell])
    return max(math.ceil(units * (errors / gap) ** 2), units + 1)


def _difference(sums: Floats) -> Floats:
    """[…, K] the candidate's ratio minus the baseline's from […, K, S, R]; NaN where a denominator is 0."""
    above, below = sums[..., 0], sums[..., 1]
    ratios = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    return ratios[..., 0] - ratios[..., 1]
