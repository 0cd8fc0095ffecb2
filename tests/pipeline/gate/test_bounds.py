"""The gate's bounds against formulas, and its error rates where the truth is known."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from benchmarks import gate as worlds
from pipeline.gate.bounds import Bounds, bounds, outcomes, units_needed, verdict

SEEDED = {"samples": 4000, "seed": 0, "error_rate": 0.025}


def ratios(rng: np.random.Generator, units: int, cells: int, loss: float, spread: float = 0.1) -> Any:
    """[U, K, 2, 2]: each unit proposes about 100 tokens; the candidate's true rate is `loss` below 0.5."""
    proposed = rng.integers(80, 120, (units, cells, 2)).astype(float)
    hardness = rng.normal(0, 0.15, (units, 1))  # what makes a text hard is so for both sides, at any budget
    own = rng.normal(0, spread, (units, cells, 2))
    rate = 0.5 + hardness[..., None] + own
    rate[:, :, 0] -= loss
    return np.stack([rate * proposed, proposed], axis=-1)


# ── bounds ────────────────────────────────────────────────────────────────────────────────────────


def test_differences_and_errors_match_the_formulas_of_a_ratio() -> None:
    sums = ratios(np.random.default_rng(1), 80, 1, 0.04)
    found = bounds([sums], **SEEDED)
    num, den = sums[:, 0, :, 0], sums[:, 0, :, 1]
    rates = num.sum(0) / den.sum(0)
    # The linear part of each unit's pull on the difference: the delta method.
    pull = ((num - rates * den) / den.sum(0)) @ [1, -1]
    assert found.difference[0] == pytest.approx(rates[0] - rates[1])
    assert found.error[0] == pytest.approx(math.sqrt((pull**2).sum()), rel=0.05)
    # Deviations either way: the normal's 97.5 % of the absolute value, and alone is together for one cell.
    assert found.alone[0] == pytest.approx(NormalDist().inv_cdf(1 - 0.025 / 2), rel=0.06)
    assert found.together[0] == found.alone[0]


def test_the_same_cell_twice_widens_nothing_and_independent_cells_as_sidak_says() -> None:
    rng = np.random.default_rng(2)
    one = ratios(rng, 100, 1, 0.0)
    twice = bounds([np.concatenate([one, one], axis=1)], **SEEDED)
    assert twice.together[0] == pytest.approx(twice.alone[0])
    strata = [ratios(rng, 100, 1, 0.0) for _ in range(8)]  # data sets share no documents
    together = bounds(strata, **SEEDED).together
    sidak = NormalDist().inv_cdf(1 - (1 - (1 - 0.025) ** (1 / 8)) / 2)
    assert together == pytest.approx(sidak, rel=0.06)


def test_a_cell_without_spread_is_no_division_by_zero() -> None:
    rng = np.random.default_rng(3)
    noisy, flat = ratios(rng, 50, 1, 0.0), np.full((50, 1, 2, 2), 50.0)
    with np.errstate(all="raise"):
        found = bounds([np.concatenate([noisy, flat], axis=1)], **SEEDED)
    assert (found.difference[1], found.low[1], found.high[1]) == (0, 0, 0)
    assert found.together[0] == pytest.approx(bounds([noisy], **SEEDED).together[0])
    assert outcomes(found, np.array([-1.0, -0.01])) == ["pass", "pass"]
    assert outcomes(found, np.array([-1.0, 0.01])) == ["pass", "fail"]  # a gain is asked for
    assert units_needed(found, 1, 0.0, 0.0, 50) is None


def test_what_has_no_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing below"):
        bounds([np.zeros((5, 1, 2, 2))], **SEEDED)
    with pytest.raises(ValueError, match="stratum"):
        bounds([], **SEEDED)


def test_no_cell_is_no_evidence_and_one_failure_decides() -> None:
    assert verdict([]) == "not_enough_evidence"
    assert verdict(["pass", "open"]) == "not_enough_evidence"
    assert verdict(["pass", "open", "fail"]) == "fail"
    assert verdict(["pass", "pass"]) == "pass"


# ── error rates where the truth is known ──────────────────────────────────────────────────────────


def said(loss: float, floor: float, units: int = 60, trials: int = 300, cells: int = 4) -> dict[str, float]:
    rng = np.random.default_rng(4)
    told = []
    for _ in range(trials):
        found = bounds([ratios(rng, units, cells, loss)], samples=400, seed=0, error_rate=0.025)
        told.append(verdict(outcomes(found, np.full(cells, floor))))
    return {name: told.count(name) / trials for name in ("fail", "pass", "not_enough_evidence")}


def test_without_a_true_difference_it_rarely_fails() -> None:
    # At a true rate of 2.5 %, 300 trials give more than 5 % with a chance under 1 %.
    assert said(0.0, 0.0)["fail"] <= 0.05


def test_a_loss_of_exactly_the_margin_rarely_passes_and_rarely_fails() -> None:
    found = said(0.02, -0.02, cells=1)
    assert found["pass"] <= 0.05 and found["fail"] <= 0.05


def test_a_large_loss_is_found_and_a_gain_passes() -> None:
    assert said(0.12, -0.02)["fail"] >= 0.95
    assert said(-0.12, -0.02)["pass"] >= 0.95


def test_the_number_of_units_that_it_asks_for_is_enough_four_times_in_five() -> None:
    """One cell whose true difference and error are what was observed."""
    spread, loss, floor, seen = 0.1, 0.03, -0.01, 20
    error = math.sqrt(2) * spread / math.sqrt(seen)
    width = NormalDist().inv_cdf(1 - 0.025 / 2)
    observed = Bounds(*(np.array([value]) for value in (-loss, error, width, width)))
    needed = units_needed(observed, 0, -loss, floor, seen)
    by_hand = ((width + NormalDist().inv_cdf(0.8)) * math.sqrt(2) * spread / (loss + floor)) ** 2
    assert needed == math.ceil(by_hand)
    assert said(loss, floor, units=needed, trials=200, cells=1)["fail"] == pytest.approx(0.8, abs=0.09)


def test_as_many_units_as_it_asks_for_let_all_cells_pass_four_times_in_five() -> None:
    """Five independent cells without a true difference, whose errors are what was observed."""
    spread, floor, seen = 0.1, -0.03, 20
    error, width = math.sqrt(2) * spread / math.sqrt(seen), NormalDist().inv_cdf(1 - 0.025 / 2)
    observed = Bounds(*(np.full(5, value) for value in (0.0, error, width, width)))
    needed = units_needed(observed, 0, 0.0, floor, seen)
    assert needed is not None
    assert 0.75 <= said(0.0, floor, units=needed, trials=200, cells=5)["pass"] <= 0.95
    alone = math.ceil(seen * ((width + NormalDist().inv_cdf(0.8)) * error / floor) ** 2)
    assert said(0.0, floor, units=alone, trials=200, cells=5)["pass"] < 0.65


@pytest.mark.parametrize("wanted", [0.0, -0.05])
def test_the_benchmark_resamples_documents_whose_truth_it_knows(wanted: float) -> None:
    sums = ratios(np.random.default_rng(14), 40, 3, 0.03)
    moved = worlds.shifted(sums, np.full(3, wanted))(sums, np.random.default_rng(0))
    assert bounds([moved], **SEEDED).difference == pytest.approx(wanted)
    assert np.array_equal(moved[..., 1], sums[..., 1]) and np.array_equal(moved[:, :, 1], sums[:, :, 1])
    swapped = worlds.swapped(sums, np.random.default_rng(0))
    changed = (swapped != sums).any(axis=(1, 2, 3))
    assert 5 < changed.sum() < 35
    assert np.array_equal(swapped[changed], sums[changed][:, :, ::-1])  # in all cells at once
    assert np.array_equal(swapped[~changed], sums[~changed])


def test_a_share_has_wilsons_interval() -> None:
    row = worlds.share_row("x", [True] * 10 + [False] * 90, 0.05)
    assert (row.value, row.met) == (10, True)
    assert (row.low, row.high) == pytest.approx((5.52, 17.44), abs=0.01)  # as tables give it for 10 of 100
