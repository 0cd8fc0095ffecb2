"""What is measured and how sure we are of it. numpy only.

Rates are pooled: the sum of the numerators over the sum of the denominators, never a mean of ratios, so a
prompt weighs as much as the draft tokens it saw. Intervals are percentile bootstraps at 95 % that resample
whole units (prompts, or clusters of prompts that share a document), seeded and hence repeatable.

Shapes: N units, C clusters, B bootstrap samples, K training seeds, R repeats, G draft positions (γ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NGRAM = 4


def repetition_rate(tokens: Sequence[int]) -> float:
    """Share of a continuation's 4-grams that already occurred earlier in it.

    0 where every 4-gram is new, near 1 for looping text. A continuation of fewer than five tokens has at
    most one 4-gram, which cannot repeat: 0.
    """
    count = len(tokens) - NGRAM + 1
    if count < 2:
        return 0.0
    distinct = {tuple(tokens[start : start + NGRAM]) for start in range(count)}
    return 1.0 - len(distinct) / count


def conditional_acceptance(reached: ArrayLike, kept: ArrayLike) -> list[float]:
    """Acceptance at each draft position among the rounds that got there, pooled over N prompts.

    Args:
        reached: [N, G] rounds in which all earlier positions were accepted.
        kept: [N, G] those of them in which this position was accepted.

    Returns:
        At most G rates; positions that no round reached are left off at the end.
    """
    reached_G = np.asarray(reached, dtype=np.float64).sum(axis=0)
    kept_G = np.asarray(kept, dtype=np.float64).sum(axis=0)
    seen = int(np.count_nonzero(reached_G))
    assert np.all(reached_G[:seen] > 0), "a draft position was reached without the one before it"
    return [float(rate) for rate in kept_G[:seen] / reached_G[:seen]]


Number = int | float


@dataclass(frozen=True)
class Counts:
    """What the rounds of one continuation add up to. Position i is the (i+1)-th proposal of a round.

    Estimates are not whole numbers; `num_proposed` is None where replay cannot know it.
    """

    num_tokens: int
    num_rounds: Number
    num_proposed: Number | None
    num_accepted: Number
    reached: tuple[Number, ...]
    kept: tuple[Number, ...]
