"""Paired differences, and those over training seeds, by hand."""

from dataclasses import astuple, replace

import pytest

from pipeline.results.differences import Resampling, control_gaps, family_gains, gains
from pipeline.results.pool import replayed_or_measured
from tests.helpers.report import AXES, row

RESAMPLING = Resampling(samples=500, seed=0)
SEEDS = ("a~1", "a~2", "a~3", "b~1", "b~2", "b~3")


def found(compare, rows, drafters=AXES.drafters):
    return compare(replayed_or_measured(rows), replace(AXES, drafters=drafters), RESAMPLING)


def rows_of(accepted: dict[str, int], prompts=range(6), **changes):
    return [row(drafter, p, kept, 100, **changes) for drafter, kept in accepted.items() for p in prompts]


def test_intervals_of_differences_resample_documents():
    """One prompt of each document gains 30 points, the other loses 10: each document gains 10."""
    uneven = [row("full_only", p, 40, 100) for p in range(6)]
    uneven += [row("multi_view", p, 30 if p % 2 else 70, 100) for p in range(6)]
    uneven += [row("multi_view", p, 30, 100, control="other_prompt") for p in range(6)]
    gain, _ = found(gains, uneven)
    assert astuple(gain.value) == pytest.approx((0.1, 0.1, 0.1))
    assert (gain.num_prompts, gain.num_documents) == (6, 3)
    (gap,) = found(control_gaps, uneven)
    assert astuple(gap.value) == pytest.approx((0.2, 0.2, 0.2))
    assert (gap.num_prompts, gap.num_documents) == (6, 3)


@pytest.mark.parametrize("extra", [{"sinks": 4}, {"refresh": 2}, {}], ids=str)
def test_a_control_without_a_prefix_stands_beside_every_kind_of_view(extra):
    """Views without a prefix have no sinks and choose nothing again; other controls have what theirs has."""
    rows = [row("full_only", p, 40, 100, **extra) for p in range(6)]
    rows += [row("full_only", p, 30, 100, budget=0, control="no_prefix") for p in range(6)]
    rows += [row("full_only", p, 25, 100, control="other_prompt", **extra) for p in range(6)]
    gaps = {gap.cell.control: gap for gap in found(control_gaps, rows)}
    assert gaps["no_prefix"].value.mean == pytest.approx(0.1) and gaps["no_prefix"].real_budget == 16
    assert gaps["other_prompt"].value.mean == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("drafters", "pairs"),
    [
        (("x", "y", "z"), ["y-x", "z-x", "z-y"]),
        (("a~1", "a~2", "b~1", "b~2"), ["b~1-a~1", "b~2-a~2"]),
        (("a~1", "a~2", "b~2", "b~1"), ["b~2-a~2", "b~1-a~1"]),
        (("x", "a~1", "a~2"), ["a~1-x"]),
        (("a~7", "a~2", "x"), ["x-a~7"]),
        (("a~1", "a~2", "b~2", "b~3"), ["b~2-a~2"]),
    ],
)
def test_gains_compare_drafters_of_one_seed(drafters, pairs):
    made = found(gains, rows_of(dict.fromkeys(drafters, 40)), drafters)
    assert [f"{g.cell.drafter}-{g.baseline}" for g in made if g.prompts == "all"] == pairs


def test_gains_over_training_seeds_by_hand():
    """b gains 20, 10 and 6 points, and under the control 5 with each seed."""
    accepted = dict(zip(SEEDS, (40, 42, 44, 60, 52, 50), strict=True))
    rows = rows_of(accepted) + rows_of(
        dict(zip(SEEDS, (30, 30, 30, 35, 35, 35), strict=True)), control="other_prompt"
    )
    # Two more that only some drafters hold, and one that loops for all.
    rows += rows_of({"a~1": 99, "b~1": 0}, prompts=[20, 22])
    rows += rows_of(dict.fromkeys(SEEDS, 90), prompts=[6], looping=True)
    every, varied, control = found(family_gains, rows, SEEDS)
    assert (every.cell.drafter, every.baseline) == ("b", "a")
    assert (every.cell.budget, every.cell.control) == (16, None)
    assert every.by_seed == pytest.approx([0.20 * 6 / 7, 0.10 * 6 / 7, 0.06 * 6 / 7])
    assert every.value.mean == pytest.approx(0.12 * 6 / 7)
    assert (every.num_prompts, every.num_documents, every.num_seeds) == (7, 4, 3)
    # Without the prompt that loops all documents agree: only the seeds are left to resample.
    assert (varied.prompts, varied.num_prompts, varied.num_documents) == ("not_looping", 6, 3)
    assert astuple(varied.value) == pytest.approx((0.12, 0.06, 0.20))
    assert control.cell.control == "other_prompt"
    assert astuple(control.value) == pytest.approx((0.05, 0.05, 0.05))


def test_families_are_matched_by_seed_not_by_order():
    accepted = {"a~1": 10, "a~2": 50, "a~3": 30, "b~2": 55, "b~1": 15, "b~4": 99}
    gain, _ = found(family_gains, rows_of(accepted), tuple(accepted))
    assert gain.by_seed == pytest.approx([0.05, 0.05])
    assert (gain.value.low, gain.value.high) == pytest.approx((0.05, 0.05))


@pytest.mark.parametrize(
    "drafters", [("full_only", "multi_view"), ("a~1", "a~2", "b"), ("a~1", "a~2", "b~2", "b~3")]
)
def test_fewer_than_two_seeds_in_common_are_no_family_gain(drafters):
    assert found(family_gains, rows_of(dict.fromkeys(drafters, 40)), drafters) == []


def test_cells_that_a_seed_lacks_are_compared_over_the_others():
    accepted = dict(zip(SEEDS, (40, 40, 40, 50, 60, 70), strict=True))
    rows = rows_of(accepted) + rows_of({name: accepted[name] for name in SEEDS[:5]}, budget="full")
    both = [g for g in found(family_gains, rows, SEEDS) if g.prompts == "all"]
    assert [(g.cell.budget, g.num_seeds) for g in both] == [(16, 3), ("full", 2)]
    assert [g.value.mean for g in both] == pytest.approx([0.2, 0.15])
