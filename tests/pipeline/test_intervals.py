"""Repetition, and intervals against closed forms and by how often they hold the truth."""

from dataclasses import astuple

import numpy as np
import pytest

from pipeline import intervals, metrics
from pipeline.intervals import Interval
from pipeline.metrics import Counts

SEEDED = {"samples": 4000, "seed": 3}


def test_repetition_rate_by_hand():
    assert metrics.repetition_rate([1, 2, 3, 4, 5, 6, 7, 8]) == 0.0
    # 1212 2121 1212 2121 1212: five 4-grams, three of which occurred before.
    assert metrics.repetition_rate([1, 2, 1, 2, 1, 2, 1, 2]) == pytest.approx(3 / 5)
    assert metrics.repetition_rate([7] * 103) == pytest.approx(99 / 100)
    # abcd bcda cdab dabc abcd: one of five.
    assert metrics.repetition_rate([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


@pytest.mark.parametrize("length", range(5))
def test_text_too_short_to_repeat_has_no_repetition(length: int):
    assert metrics.repetition_rate([9] * length) == 0.0


def test_rate_is_pooled_not_a_mean_of_ratios():
    interval = intervals.bootstrap_interval([1, 90], [10, 100], **SEEDED)
    assert interval.mean == pytest.approx(91 / 110)
    # Two units: a resample takes both, or one of them twice.
    assert (interval.low, interval.high) == (pytest.approx(0.1), pytest.approx(0.9))


def test_interval_of_a_share_matches_the_normal_approximation():
    successes = np.arange(400) % 10 < 3  # exactly 30 %
    interval = intervals.bootstrap_interval(successes, np.ones(400), **SEEDED)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.006)
    assert interval.high == pytest.approx(0.3 + half, abs=0.006)


def test_coverage_on_simulated_prompts():
    """Prompts of their own difficulty and length: about 95 intervals in 100 hold the true pooled rate."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        proposed = rng.integers(50, 150, size=60)
        accepted = rng.binomial(proposed, rng.beta(8, 8, size=60))  # true rate 0.5, whatever the length
        interval = intervals.bootstrap_interval(accepted, proposed, samples=400, seed=1)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.91 <= hits / 400 <= 0.98


def test_same_seed_same_interval_other_seed_another():
    data = (list(range(1, 30)), [40] * 29)
    first = intervals.bootstrap_interval(*data, samples=500, seed=1)
    assert first == intervals.bootstrap_interval(*data, samples=500, seed=1)
    assert first.low != intervals.bootstrap_interval(*data, samples=500, seed=2).low


def test_clusters_are_resampled_whole():
    """Ten copies of each of 20 units hold no more than 20 units do."""
    rng = np.random.default_rng(5)
    accepted, proposed = rng.integers(10, 90, size=20), np.full(20, 100)
    names = [f"d{i}" for i in range(20)]
    alone = intervals.bootstrap_interval(accepted, proposed, **SEEDED, clusters=sorted(names))
    copies = intervals.bootstrap_interval(
        np.repeat(accepted, 10),
        np.repeat(proposed, 10),
        **SEEDED,
        clusters=np.repeat(sorted(names), 10).tolist(),
    )
    naive = intervals.bootstrap_interval(np.repeat(accepted, 10), np.repeat(proposed, 10), **SEEDED)
    assert astuple(copies) == pytest.approx(astuple(alone))
    assert naive.high - naive.low < 0.5 * (copies.high - copies.low)


def test_paired_difference_of_identical_data_is_zero():
    side = ([3, 50, 7], [10, 60, 70])
    assert intervals.paired_difference(side, side, **SEEDED) == Interval(0.0, 0.0, 0.0)


def test_pairing_cancels_what_prompts_have_in_common():
    rng = np.random.default_rng(2)
    hard = rng.integers(0, 80, size=40)
    proposed = np.full(40, 100)
    better, worse = (hard + 5, proposed), (hard, proposed)
    paired = intervals.paired_difference(better, worse, **SEEDED)
    assert astuple(paired) == pytest.approx((0.05, 0.05, 0.05))
    alone = intervals.bootstrap_interval(*worse, **SEEDED)
    assert alone.high - alone.low > 0.1


def test_paired_difference_matches_the_normal_approximation():
    rng = np.random.default_rng(4)
    first, second = rng.integers(40, 60, size=200), rng.integers(30, 55, size=200)
    proposed = np.full(200, 100)
    interval = intervals.paired_difference((first, proposed), (second, proposed), **SEEDED)
    gaps = (first - second) / 100
    half = 1.96 * gaps.std() / np.sqrt(200)
    assert interval.mean == pytest.approx(gaps.mean())
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.06)


def seeded_counts(rng, seeds: int, units: int):
    """Proposed and accepted tokens, [K, N], of drafters that differ by seed and of prompts of their own."""
    proposed = rng.integers(20, 60, size=(seeds, units))
    rate = np.clip(0.5 + rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.1, units), 0.05, 0.95)
    return rng.binomial(proposed, rate), proposed


def test_one_training_seed_is_a_paired_difference():
    rng = np.random.default_rng(8)
    first, second = seeded_counts(rng, 1, 30), seeded_counts(rng, 1, 30)
    clusters = [f"d{i // 3}" for i in range(30)]
    seeded = intervals.seeded_difference(first, second, **SEEDED, clusters=clusters)
    rows = [(num[0], den[0]) for num, den in (first, second)]
    paired = intervals.paired_difference(*rows, **SEEDED, clusters=clusters)
    assert astuple(seeded) == pytest.approx(astuple(paired))


def test_seeded_difference_matches_a_loop_over_documents_and_seeds():
    rng = np.random.default_rng(9)
    first, second = seeded_counts(rng, 4, 24), seeded_counts(rng, 4, 24)
    documents = [f"d{i % 8}" for i in range(24)]
    interval = intervals.seeded_difference(first, second, samples=20_000, seed=3, clusters=documents)

    def difference(seeds, units) -> float:
        return float(
            np.mean([
                num[k, units].sum() / den[k, units].sum() - other[k, units].sum() / other_den[k, units].sum()
                for k in seeds
                for (num, den), (other, other_den) in [(first, second)]
            ])
        )  # fmt: skip

    draws = []
    for _ in range(4000):
        drawn = rng.integers(8, size=8)
        units = np.concatenate([np.arange(24)[np.arange(24) % 8 == d] for d in drawn])
        draws.append(difference(rng.integers(4, size=4), units))
    assert interval.mean == pytest.approx(difference(range(4), np.arange(24)))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert high - low > 0.05
    assert (interval.low, interval.high) == (pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005))


def test_a_difference_is_compared_with_another_on_the_same_resamples():
    """By seed +20 and +10 points here and +5 and +5 there; a difference less itself is nothing."""
    proposed = np.full((2, 6), 100)
    rates = ([60, 55], [40, 45], [45, 45], [40, 40])
    here, here_too, there, there_too = ((np.repeat([rate], 6, axis=0).T, proposed) for rate in rates)
    interval = intervals.seeded_difference(here, here_too, less=(there, there_too), **SEEDED)
    assert astuple(interval) == pytest.approx((0.10, 0.05, 0.15))
    rng = np.random.default_rng(12)
    first, second = seeded_counts(rng, 3, 20), seeded_counts(rng, 3, 20)
    same = intervals.seeded_difference(first, second, less=(first, second), **SEEDED)
    assert same == Interval(0.0, 0.0, 0.0)
    assert intervals.seeded_difference(first, second, **SEEDED).low < -0.01


def test_seeded_difference_covers_the_true_difference():
    """Seeds and documents that each matter, seeds in plenty: about 95 intervals in 100 hold the truth."""
    rng = np.random.default_rng(10)
    hits = 0
    for trial in range(300):
        gain = 0.06 + rng.normal(0, 0.03, (16, 1)) + rng.normal(0, 0.05, 40)
        first, second = rng.binomial(100, 0.5 + gain), rng.binomial(100, 0.5, size=(16, 40))
        proposed = np.full((16, 40), 100)
        interval = intervals.seeded_difference((first, proposed), (second, proposed), samples=400, seed=trial)
        hits += interval.low <= 0.06 <= interval.high
    assert 0.90 <= hits / 300 <= 0.99


def test_interval_over_three_seeds_is_their_range():
    """Where nothing but the seeds matters it holds the truth unless all three err to one side: 1 - 2 / 2³."""
    rng = np.random.default_rng(11)
    proposed, hits = np.full((3, 5), 100), 0
    for _ in range(400):
        gains = rng.normal(5, 3, size=(3, 1)).repeat(5, axis=1)
        interval = intervals.seeded_difference(
            (40 + gains, proposed), (np.full((3, 5), 40), proposed), samples=2000, seed=1
        )
        assert (interval.low, interval.high) == pytest.approx((gains.min() / 100, gains.max() / 100))
        hits += interval.low <= 0.05 <= interval.high
    assert hits / 400 == pytest.approx(0.75, abs=0.06)


def test_units_that_propose_nothing_do_not_break_a_resample():
    interval = intervals.bootstrap_interval([5, 0, 0], [10, 0, 0], **SEEDED)
    assert interval == Interval(0.5, 0.5, 0.5)


def test_what_has_no_rate_is_refused():
    with pytest.raises(ValueError, match="sum to zero"):
        intervals.bootstrap_interval([0, 0], [0, 0], **SEEDED)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        intervals.bootstrap_interval([1, 2], [1, 2, 3], **SEEDED)
    with pytest.raises(ValueError, match="2 and 1 units"):
        intervals.paired_difference(([1, 1], [2, 2]), ([1], [2]), **SEEDED)
    with pytest.raises(ValueError, match="1 cluster names for 2 units"):
        intervals.bootstrap_interval([1, 2], [3, 4], **SEEDED, clusters=["a"])
    with pytest.raises(ValueError, match=r"\[K, N\]"):
        intervals.seeded_difference(([[1, 1]], [[2, 2]]), ([[1], [1]], [[2], [2]]), **SEEDED)
    with pytest.raises(ValueError, match=r"\[K, N\]"):
        intervals.seeded_difference(([1], [2]), ([1], [2]), **SEEDED)


def counts_of(reached: list[float], kept: list[float]) -> Counts:
    return Counts(0, 0, None, 0, tuple(reached), tuple(kept))


def test_conditional_acceptance_pools_prompts_and_stops_where_no_round_came():
    pooled = Counts.pooled([counts_of([4, 3, 0], [3, 0, 0]), counts_of([6, 1, 0], [1, 1, 0])])
    assert pooled.conditional_acceptance == pytest.approx([4 / 10, 1 / 4])
    assert counts_of([0, 0], [0, 0]).conditional_acceptance == []
    # Expected counts are no whole numbers.
    estimates = Counts.pooled([counts_of([0.5, 0.25], [0.25, 0.2]), counts_of([0.5, 0], [0, 0])])
    assert estimates.conditional_acceptance == [0.25, 0.8]


def test_rates_of_counts_are_pooled():
    pooled = Counts.pooled([Counts(10, 4, 12, 6, (), ()), Counts(30, 6, 28, 24, (), ())])
    assert pooled.acceptance == 30 / 40 and pooled.tau == 40 / 10
    assert Counts.pooled([Counts(10, 4, 12, 6, (), ()), Counts(3, 2, None, 1, (), ())]).acceptance is None
    assert Counts(1, 1, 0, 0, (), ()).acceptance is None


def test_speedup_is_pooled_over_prompts_and_repeats():
    tokens = [100, 10]
    speed = intervals.speedup(
        (tokens, [[10.0, 12.0, 14.0], [4.0, 4.0, 40.0]]),
        (tokens, [[24.0, 24.0, 24.0], [2.0, 2.0, 2.0]]),
        **SEEDED,
    )
    assert speed.overall.mean == pytest.approx((72 + 6) / (36 + 48))
    # The median leaves the one slow repeat out: 2 s against 4 s.
    assert speed.worst_prompt == pytest.approx(0.5)
    assert speed.overall.low < speed.overall.mean < speed.overall.high


def test_speedup_counts_tokens_where_the_runs_differ_in_length():
    """Sampled text: half the tokens in half the time is no speedup."""
    speed = intervals.speedup(([50], [[1.0]]), ([100], [[2.0]]), **SEEDED)
    assert astuple(speed.overall) == pytest.approx((1.0, 1.0, 1.0)) and speed.worst_prompt == pytest.approx(
        1.0
    )


def test_speedup_resamples_tokens_with_the_seconds_they_took():
    """One prompt runs at 4 times AR's speed, the other at 2 times; lengths and AR speeds differ."""
    speed = intervals.speedup(([1000, 10], [[10.0], [1.0]]), ([900, 12], [[36.0], [2.4]]), **SEEDED)
    assert (speed.overall.low, speed.overall.high) == (pytest.approx(2.0), pytest.approx(4.0))


def test_speedup_resamples_clusters_whole_and_their_repeats():
    """Two documents of two prompts: 4 times AR's speed in one, twice in the other, alike within neither."""
    own = [[2.0], [6.0], [12.0], [4.0]]
    ar = [[16.0], [16.0], [16.0], [16.0]]
    speed = intervals.speedup(([8] * 4, own), ([8] * 4, ar), **SEEDED, clusters=["a", "a", "b", "b"])
    assert astuple(speed.overall) == pytest.approx((64 / 24, 2.0, 4.0))
    assert speed.worst_prompt == pytest.approx(16 / 12)
    # One document whose second repeat ran at half the speed: repeats 1 and 2, or one of them twice.
    own, ar = [[1.0, 2.0], [3.0, 6.0]], [[4.0, 4.0], [4.0, 4.0]]
    speed = intervals.speedup(([8] * 2, own), ([8] * 2, ar), **SEEDED, clusters=["a", "a"])
    assert astuple(speed.overall) == pytest.approx((16 / 12, 8 / 8, 8 / 4))


def test_speedup_interval_covers_the_true_ratio():
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(200):
        length = rng.uniform(1, 2, size=(12, 1))  # seconds of AR, by prompt
        ar = length * rng.lognormal(0, 0.02, size=(12, 3))
        own = length / 1.5 * rng.lognormal(0, 0.1, size=(12, 1)) * rng.lognormal(0, 0.02, size=(12, 3))
        speed = intervals.speedup(([64] * 12, own), ([64] * 12, ar), samples=300, seed=1)
        hits += speed.overall.low <= 1.5 / np.exp(0.1**2 / 2) <= speed.overall.high
    assert 0.86 <= hits / 200 <= 1.0


@pytest.mark.parametrize(
    ("speculative", "ar", "told"),
    [
        (([5], [[1.0, 1.0]]), ([5], [[1.0]]), r"\[N, R\]"),
        (([5], [[]]), ([5], [[]]), r"\[N, R\]"),
        (([5], [[0.0]]), ([5], [[1.0]]), "positive"),
        (([0], [[1.0]]), ([5], [[1.0]]), "positive"),
    ],
)
def test_times_that_cannot_be_compared_are_refused(speculative, ar, told):
    with pytest.raises(ValueError, match=told):
        intervals.speedup(speculative, ar, **SEEDED)
