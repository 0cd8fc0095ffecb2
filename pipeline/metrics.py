"""Every metric of decoding, defined once: rounds, counts, acceptance, τ, departure, repetition. numpy only.

Rates are pooled: the sum of the numerators over the sum of the denominators, never a mean of ratios, so a
prompt weighs as much as the draft tokens it saw. Their confidence intervals are in `intervals.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

NGRAM = 4
Number = int | float


@dataclass(frozen=True, slots=True)
class Round:
    """One draft → verify → accept cycle, as it was decoded or as replay derives it.

    `tokens` are the emitted tokens: the accepted proposals, then the target's own token. `proposed` is None
    where replay cannot know how many proposals followed a wrong one.
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
        ended: whether the last of these is EOS. Proposals behind it count neither as proposed nor accepted.
    """
    return min(drafted, allowed, emitted) if ended else min(drafted, allowed)


@dataclass(frozen=True, slots=True)
class Counts:
    """Sums over rounds. The token that the prefill gives is not counted.

    `reached[i]` is the number of rounds that got as far as draft position i (from 0), `kept[i]` the number
    of these that accepted it. Estimated counts are not whole numbers; `num_proposed` is None where replay
    cannot know it.
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
        for round_ in rounds:
            fewest = round_.accepted + 1
            if round_.proposed is not None:
                fewest = min(fewest, round_.proposed)
            for position in range(fewest):
                reached[position] += 1
                kept[position] += position < round_.accepted
        return Counts(
            num_tokens=sum(round_.emitted for round_ in rounds),
            num_rounds=len(rounds),
            num_proposed=sum_of_known(round_.proposed for round_ in rounds),
            num_accepted=sum(round_.accepted for round_ in rounds),
            reached=tuple(reached),
            kept=tuple(kept),
        )

    @staticmethod
    def pooled(counts: Sequence[Counts]) -> Counts:
        """The sum of several counts, all of the same γ."""
        positions = [(part.reached, part.kept) for part in counts]
        reached, kept = np.array(positions).sum(0).tolist() if positions else ((), ())
        return Counts(
            num_tokens=sum(part.num_tokens for part in counts),
            num_rounds=sum(part.num_rounds for part in counts),
            num_proposed=sum_of_known(part.num_proposed for part in counts),
            num_accepted=sum(part.num_accepted for part in counts),
            reached=tuple(reached),
            kept=tuple(kept),
        )

    @property
    def acceptance(self) -> float | None:
        """Accepted ÷ proposed draft tokens; None where nothing was proposed, or replay cannot know it."""
        return self.num_accepted / self.num_proposed if self.num_proposed else None

    @property
    def tau(self) -> float:
        """τ, mean tokens per round: emitted tokens ÷ rounds, with the target's own token of each round."""
        return self.num_tokens / self.num_rounds

    @property
    def conditional_acceptance(self) -> list[float]:
        """Acceptance at each draft position, among the rounds that reached it; up to the last one reached."""
        reached, kept = np.array(self.reached, dtype=np.float64), np.array(self.kept, dtype=np.float64)
        seen = int(np.count_nonzero(reached))
        assert np.all(reached[:seen] > 0), "a draft position was reached without the one before it"
        return [float(rate) for rate in kept[:seen] / reached[:seen]]


@dataclass(frozen=True, slots=True)
class Scored:
    """A text as the target reads it: its tokens behind the first, the target's arg-max in place of each of
    them, and the natural logarithm of the probability that the target gives it at temperature 1."""

    tokens: Sequence[int]
    best: Sequence[int]
    log_probs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Departure:
    """How far texts of a lossy rule are from the target's own, greedy ones: sums, and what follows from them.

    The token that the prefill gives is the same in both and not counted. Positions are compared up to the
    shorter length. `first_difference` is the number of the first token that differs, the prefill's being 0;
    None where none does, and of several texts the earliest. Logarithms are natural ones.
    """

    num_compared: int
    num_same: int
    first_difference: int | None
    num_tokens: int
    num_not_best: int
    log_prob: float
    num_ar_tokens: int
    ar_log_prob: float

    @staticmethod
    def of(text: Scored, ar: Scored) -> Departure:
        same = [a == b for a, b in zip(text.tokens, ar.tokens, strict=False)]
        return Departure(
            num_compared=len(same),
            num_same=sum(same),
            first_difference=next((number for number, one in enumerate(same, start=1) if not one), None),
            num_tokens=len(text.tokens),
            num_not_best=sum(a != b for a, b in zip(text.tokens, text.best, strict=True)),
            log_prob=sum(text.log_probs),
            num_ar_tokens=len(ar.tokens),
            ar_log_prob=sum(ar.log_probs),
        )

    @staticmethod
    def pooled(parts: Sequence[Departure]) -> Departure:
        firsts = [part.first_difference for part in parts if part.first_difference is not None]
        return Departure(
            num_compared=sum(part.num_compared for part in parts),
            num_same=sum(part.num_same for part in parts),
            first_difference=min(firsts, default=None),
            num_tokens=sum(part.num_tokens for part in parts),
            num_not_best=sum(part.num_not_best for part in parts),
            log_prob=sum(part.log_prob for part in parts),
            num_ar_tokens=sum(part.num_ar_tokens for part in parts),
            ar_log_prob=sum(part.ar_log_prob for part in parts),
        )

    @property
    def same(self) -> float:
        """Share of positions at which the text is the target's own."""
        return self.num_same / self.num_compared

    @property
    def not_best(self) -> float:
        """Share of tokens that are not the target's arg-max behind the tokens before them."""
        return self.num_not_best / self.num_tokens

    @property
    def mean_log_prob(self) -> float:
        """The target's log-likelihood of the text, a token."""
        return self.log_prob / self.num_tokens

    @property
    def ar_mean_log_prob(self) -> float:
        """The same of the target's own text."""
        return self.ar_log_prob / self.num_ar_tokens


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
