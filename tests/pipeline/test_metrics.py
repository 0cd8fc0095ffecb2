"""How far texts of a lossy rule depart from the target's own, by hand."""

from __future__ import annotations

import pytest

from pipeline.metrics import Departure, Scored


def test_a_departure_by_hand() -> None:
    """The third token differs and a later one agrees again; the other text ends earlier."""
    lossy = Scored([5, 6, 7, 8, 9], [5, 6, 1, 8, 2], [-1.0, -0.5, -3.0, -0.5, -2.0])
    own = Scored([5, 6, 1, 8], [5, 6, 1, 8], [-1.0, -0.5, -0.5, -1.0])
    one = Departure.of(lossy, own)
    assert (one.num_compared, one.num_same, one.first_difference) == (4, 3, 3)
    assert (one.num_tokens, one.num_not_best, one.num_ar_tokens) == (5, 2, 4)
    assert (one.same, one.not_best) == (0.75, 0.4)
    assert (one.mean_log_prob, one.ar_mean_log_prob) == pytest.approx((-1.4, -0.75))


def test_the_target_s_own_text_does_not_depart() -> None:
    own = Scored([5, 6], [5, 6], [-1.0, -0.5])
    one = Departure.of(own, own)
    assert one.first_difference is None and (one.same, one.not_best) == (1.0, 0.0)
    assert one.mean_log_prob == one.ar_mean_log_prob == -0.75


def test_departures_pool_their_sums() -> None:
    """A long text weighs more than a short one; the first difference is the earliest."""
    none = Departure(2, 2, None, 2, 0, -1.0, 2, -1.0)
    late = Departure(10, 5, 6, 10, 5, -20.0, 14, -7.0)
    both = Departure.pooled([none, late, Departure(4, 1, 2, 4, 3, -3.0, 4, -2.0)])
    assert both == Departure(16, 8, 2, 16, 8, -24.0, 20, -10.0)
    assert (both.same, both.not_best, both.mean_log_prob, both.ar_mean_log_prob) == (0.5, 0.5, -1.5, -0.5)
    assert Departure.pooled([none, none]).first_difference is None
