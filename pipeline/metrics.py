"""Every metric of decoding, defined once: rounds, counts, acceptance, τ, repetition. numpy only.

Rates are pooled: the sum of the numerators over the sum of the denominators, never a mean of ratios, so a
prompt weighs as much as the draft tokens it saw. How sure a rate is, `intervals.py` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

NGRAM = 4
Number = int | float


@dataclass(frozen=True, slots=True)
class Round:
    """One draft → verify → accept cycle, as it was decoded or as replay knows that it would be.

    `tokens` are the emitted ones: the accepted proposals, then the target's own. `proposed` is None where
    replay cannot know how many proposals followed a wrong one.
    """

    tokens: tuple[int, ...]
    proposed: int | None
    accepted: int

    @property
    def emitted(self) -> int:
        return len(self.tokens)


def counted_proposals(drafted: int, allowed: int, emitted: int, ended: bool) -> int:
    """How many of a round's proposals count as proposed.

    Args:
        drafted: proposals that were drafted.
        allowed: tokens that the text may still get; proposals beyond them are not verified.
        emitted: tokens that the round gave.
        ended: the last of them is EOS: what was proposed behind it counts neither as proposed nor accepted.
    """
    return min(drafted, allowed, emitted) if ended else min(drafted, allowed)


@dataclass(frozen=True, slots=True)
class Counts:
    """What rounds add up to. The token that the prefill gives is in none of them.

    `reached[i]` rounds got as far as draft position i, which counts from 0, and `kept[i]` of them accepted
    it. Estimates are not whole numbers; `num_proposed` is None where replay cannot know it.
    """

    num_tokens: int
    num_rounds: Number
    num_proposed: Number | None
    num_accepted: Number
    reached: tuple[Number, ...]
    kept: tuple[Number, ...]

    @staticmethod
    def of(rounds: Sequence[Round], gamma: int) -> Counts:
        """Add up rounds of at most `gamma` proposals each."""
        reached, kept = [0] * gamma, [0] * gamma
        for one in rounds:
            fewest = one.accepted + 1 if one.proposed is None else min(one.accepted + 1, one.proposed)
            for position in range(fewest):
                reached[position] += 1
                kept[position] += position < one.accepted
        return Counts(
            num_tokens=sum(one.emitted for one in rounds),
            num_rounds=len(rounds),
            num_proposed=sum_of_known(one.proposed for one in rounds),
            num_accepted=sum(one.accepted for one in rounds),
            reached=tuple(reached),
            kept=tuple(kept),
        )

    @staticmethod
    def pooled(counts: Sequence[Counts]) -> Counts:
        """The sum of several of one γ."""
        positions = [(one.reached, one.kept) for one in counts]
        reached, kept = np.array(positions).sum(0).tolist() if positions else ((), ())
        return Counts(
            num_tokens=sum(one.num_tokens for one in counts),
            num_rounds=sum(one.num_rounds for one in counts),
            num_proposed=sum_of_known(one.num_proposed for one in counts),
            num_accepted=sum(one.num_accepted for one in counts),
            reached=tuple(reached),
            kept=tuple(kept),
        )

    @property
    def acceptance(self) -> float | None:
        """Accepted ÷ proposed draft tokens; None where nothing was proposed, or replay cannot know it."""
        return self.num_accepted / self.num_proposed if self.num_proposed else None

    @property
    def tau(self) -> float:
        """τ, mean tokens per round: emitted tokens ÷ rounds, the target's own token of each included."""
        return self.num_tokens / self.num_rounds

    @property
    def conditional_acceptance(self) -> list[float]:
        """Acceptance at each draft position that a round reached, among the rounds that did."""
        reached, kept = np.array(self.reached, dtype=np.float64), np.array(self.kept, dtype=np.float64)
        seen = int(np.count_nonzero(reached))
        assert np.all(reached[:seen] > 0), "a draft position was reached without the one before it"
        return [float(rate) for rate in kept[:seen] / reached[:seen]]


def sum_of_known(values: Iterable[Number | None]) -> Number | None:
    """The sum, or None where a value is not known."""
    total: Number = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


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
