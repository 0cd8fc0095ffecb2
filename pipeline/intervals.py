"""How sure a figure is: seeded bootstraps over documents, paired and over training seeds. numpy only.

Intervals are percentile bootstraps at 95 % that resample whole units (prompts, or clusters of prompts that
share a document), seeded and hence repeatable.

Shapes: N units, C clusters, B bootstrap samples, K training seeds, R repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic of all units and the 95 % bootstrap interval around it."""

    mean: float
    low: float
    high: float


class Speedup(NamedTuple):
    """Decode speed of one cell against autoregressive decoding of the same prompts."""

    overall: Interval
    worst_prompt: float


def bootstrap_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    samples: int,
    seed: int,
    clusters: Sequence[str] | None = None,
) -> Interval:
    """Pooled ratio of N units and its interval.

    Args:
        numerators, denominators: N counts each, such as accepted and proposed draft tokens per prompt.
        samples: bootstrap resamples B.
        seed: of the resampling.
        clusters: N names; units with one name are resampled together. Default: every unit alone.

    A single unit (or cluster) has an interval of no width, which says nothing: show the number of units.

    Raises:
        ValueError: if lengths differ or the denominators sum to zero.
    """
    num, den = _by_cluster(numerators, denominators, clusters)
    return _interval(_ratio(num, den), _resampled_ratios(num, den, samples, seed))


def paired_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    samples: int,
    seed: int,
    clusters: Sequence[str] | None = None,
) -> Interval:
    """Pooled ratio of `first` minus that of `second`, both over the same N units in the same order.

    Each is (numerators, denominators). A resample takes the same units for both sides, so what the units
    have in common cancels.

    Raises:
        ValueError: if lengths differ or denominators sum to zero.
    """
    return _interval(*_paired_draws(first, second, clusters, samples, seed))


def seeded_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    less: tuple[tuple[ArrayLike, ArrayLike], tuple[ArrayLike, ArrayLike]] | None = None,
    samples: int,
    seed: int,
    clusters: Sequence[str] | None = None,
) -> Interval:
    """Mean over K training seeds of `paired_difference`, for what two ways of training differ in.

    A resample draws clusters and, independently of them, training seeds (Owen 2007, "The pigeonhole
    bootstrap"); it takes the same clusters and the same seeds for both sides.

    Few seeds make a rough interval, mostly too narrow. Where nothing but the seeds matters, that of three
    reaches from their least to their greatest difference, and holds the median one in 75 of 100 cases.

    Args:
        first, second: (numerators [K, N], denominators [K, N]); row k of both was trained with one seed.
        less: another first and second, whose difference is taken off: by how much the two differ more here
            than there.
        clusters: N names, for all rows; as in `bootstrap_interval`.

    Raises:
        ValueError: if shapes differ, there is no seed, or the denominators of a row sum to zero.
    """
    pairs = [(first, second)] if less is None else [(first, second), less]
    arrays = [np.asarray(values, dtype=np.float64) for pair in pairs for side in pair for values in side]
    shapes = [values.shape for values in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or not shapes[0][0]:
        raise ValueError(f"numerators and denominators are {shapes}: all must be [K, N], K at least 1")
    means, draws = [], []
    for num, den, other_num, other_den, *taken in zip(*arrays, strict=True):
        mean, drawn_B = _paired_draws((num, den), (other_num, other_den), clusters, samples, seed)
        if taken:
            there, there_B = _paired_draws(tuple(taken[:2]), tuple(taken[2:]), clusters, samples, seed)
            mean, drawn_B = mean - there, drawn_B - there_B
        means.append(mean)
        draws.append(drawn_B)
    num_seeds = len(means)
    draws_BK = np.stack(draws, axis=1)
    # A stream of its own: with as many seeds as clusters, the same draws would tie the two together.
    rng = np.random.default_rng([seed, 1])
    weights_BK = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=samples) / num_seeds
    return _interval(float(np.mean(means)), (weights_BK * draws_BK).sum(1))


def speedup(
    speculative: tuple[ArrayLike, ArrayLike],
    ar: tuple[ArrayLike, ArrayLike],
    *,
    samples: int,
    seed: int,
    clusters: Sequence[str] | None = None,
) -> Speedup:
    """Tokens per second of a cell ÷ those of autoregressive (AR) decoding of the same prompts.

    Each side is (tokens [N], seconds [N, R]); repeat r of a prompt ran beside repeat r of AR. `overall` pools
    tokens and seconds; its interval resamples clusters (N names; default: every prompt alone), and within
    each drawn cluster its repeats, repeat r of all its prompts at once. `worst_prompt` is the least of the
    ratios of single prompts, from the medians of their repeats.

    Raises:
        ValueError: if the shapes do not fit or a count or time is not positive.
    """
    tokens_N, seconds_NR = (np.asarray(values, dtype=np.float64) for values in speculative)
    ar_tokens_N, ar_seconds_NR = (np.asarray(values, dtype=np.float64) for values in ar)
    num, repeats = seconds_NR.shape if seconds_NR.ndim == 2 else (0, 0)
    shapes = [values.shape for values in (tokens_N, seconds_NR, ar_tokens_N, ar_seconds_NR)]
    if num * repeats == 0 or shapes != [(num,), (num, repeats), (num,), (num, repeats)]:
        raise ValueError(f"tokens and seconds are {shapes}: they must be [N], [N, R], [N], [N, R]")
    if not all(np.all(values > 0) for values in (tokens_N, seconds_NR, ar_tokens_N, ar_seconds_NR)):
        raise ValueError("token counts and seconds must be positive")
    member_N = _members(clusters, num)
    count = int(member_N.max()) + 1
    rng = np.random.default_rng(seed)
    drawn_BC = rng.integers(count, size=(samples, count))
    repeats_BCR = rng.integers(repeats, size=(samples, count, repeats))

    def rates(tokens: Floats, seconds: Floats) -> Floats:
        tokens_C, seconds_CR = np.zeros(count), np.zeros((count, repeats))
        np.add.at(tokens_C, member_N, tokens)
        np.add.at(seconds_CR, member_N, seconds)
        drawn_s = seconds_CR[drawn_BC[:, :, None], repeats_BCR].sum((1, 2))
        return repeats * tokens_C[drawn_BC].sum(1) / drawn_s

    draws = rates(tokens_N, seconds_NR) / rates(ar_tokens_N, ar_seconds_NR)
    overall = (tokens_N.sum() / seconds_NR.sum()) / (ar_tokens_N.sum() / ar_seconds_NR.sum())
    per_prompt = (tokens_N / np.median(seconds_NR, axis=1)) / (ar_tokens_N / np.median(ar_seconds_NR, axis=1))
    return Speedup(_interval(float(overall), draws), float(per_prompt.min()))


def _members(clusters: Sequence[str] | None, units: int) -> NDArray[np.intp]:
    """[N] the number of each unit's cluster, from 0."""
    if clusters is None:
        return np.arange(units)
    if len(clusters) != units:
        raise ValueError(f"{len(clusters)} cluster names for {units} units")
    return np.unique(np.asarray(clusters), return_inverse=True)[1]


def _by_cluster(
    numerators: ArrayLike, denominators: ArrayLike, clusters: Sequence[str] | None
) -> tuple[Floats, Floats]:
    """[C] and [C]: both summed over the units of each cluster."""
    num = np.asarray(numerators, dtype=np.float64)
    den = np.asarray(denominators, dtype=np.float64)
    if num.shape != den.shape or num.ndim != 1:
        raise ValueError(f"numerators and denominators are {num.shape} and {den.shape}: both must be [N]")
    if not den.sum() > 0:
        raise ValueError("the denominators sum to zero: there is no rate")
    member_N = _members(clusters, len(num))
    num_C, den_C = (np.bincount(member_N, weights=values).astype(np.float64) for values in (num, den))
    return num_C, den_C


def _paired_draws(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    clusters: Sequence[str] | None,
    samples: int,
    seed: int,
) -> tuple[float, Floats]:
    """The difference of the two pooled ratios, and [B] that of each resample."""
    first_num, first_den = _by_cluster(*first, clusters)
    second_num, second_den = _by_cluster(*second, clusters)
    if len(first_num) != len(second_num):
        raise ValueError(f"the sides have {len(first_num)} and {len(second_num)} units: they are not paired")
    draws = _resampled_ratios(first_num, first_den, samples, seed) - _resampled_ratios(
        second_num, second_den, samples, seed
    )
    return _ratio(first_num, first_den) - _ratio(second_num, second_den), draws


@lru_cache(maxsize=16)
def draw_counts(units: int, samples: int, seed: int) -> Floats:
    """[B, N] how often each unit is drawn. Cached: cells with equally many documents share them."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(units, np.full(units, 1 / units), size=samples).astype(np.float64)


def _resampled_ratios(num: Floats, den: Floats, samples: int, seed: int) -> Floats:
    """[B] pooled ratios of the resamples; NaN where a resample has a denominator of zero."""
    counts = draw_counts(len(num), samples, seed)
    pooled = counts @ np.stack([num, den], axis=1)
    return np.divide(pooled[:, 0], pooled[:, 1], out=np.full(samples, np.nan), where=pooled[:, 1] > 0)


def _ratio(num: Floats, den: Floats) -> float:
    return float(num.sum() / den.sum())


def _interval(mean: float, draws: Floats) -> Interval:
    """Percentiles of the draws that are defined: one drawn from units without any denominator has no rate."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws[np.isfinite(draws)], [tail, 1 - tail])
    return Interval(mean, float(low), float(high))
