"""Predicted times against sums by hand, and what is measured for them."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.axes import Cell, Place, View
from pipeline.config.schema import Config
from pipeline.config.sweep import Plane
from pipeline.intervals import Interval
from pipeline.store.rows import PredictedRow, StepTimes
from pipeline.sweep import predict
from pipeline.sweep.grid import Drafter
from pipeline.sweep.picks import by_place, first_seeds, plane_picks, worth_measuring
from tests.helpers.configs import MINIMAL
from tests.helpers.report import measured, row
from tests.helpers.rows import make

PLACE = Place("code", "64")
FIRSTS = first_seeds(["full_only", "multi_view", "multi_view~2", "prompt_lookup"])


def steps(budget: int | str, draft_s: float, kind: str = "drafter", policy: str = "chunk_topk") -> StepTimes:
    """Verifying takes 30 ms at γ = 2 and 50 ms at γ = 6, the rest of a round 1 ms, an AR token 20 ms."""
    return StepTimes(
        context="64", prompt_tokens=64, kind=kind, policy=policy, budget=budget, draft_s=draft_s,
        verify_s={2: 0.03, 6: 0.05}, round_s=0.001, ar_s=0.02,
    )  # fmt: skip


TIMES = [steps(16, 0.002), steps("full", 0.004), steps(16, 0.01, "self_speculation", "snapkv")]


def test_predicted_seconds_are_the_formula() -> None:
    rows = [row(prompt=n, num_rounds=5 + n, num_tokens=12, gamma=4, budget=16) for n in range(4)]
    (predicted,) = predict.predict(rows, TIMES, samples=200, seed=0)
    # Of γ = 4 verification lies halfway between the two that were timed.
    seconds = [(5 + n) * (4 * 0.002 + 0.04 + 0.001) for n in range(4)]
    assert predicted.decode_s == pytest.approx(sum(seconds) / 4)
    assert predicted.speedup.mean == pytest.approx(4 * 12 * 0.02 / sum(seconds))
    assert predicted.speedup.low < predicted.speedup.mean < predicted.speedup.high
    assert (predicted.num_prompts, predicted.num_documents) == (4, 2)


def test_only_exact_greedy_cells_are_predicted() -> None:
    rows = [
        row(),
        row(control="other_prompt"),
        row(mode="estimate", temperature=1.0),
        row(threshold=0.5, num_proposed=None),
        row(budget=32),  # no step of it was timed
        row("self_speculation", policy="snapkv"),
        row("self_speculation", policy="streaming"),
        measured(),
    ]
    found = predict.predict(rows, TIMES, samples=100, seed=0)
    assert {(p.cell.drafter, p.cell.policy, p.cell.budget) for p in found} == {
        ("full_only", "chunk_topk", 16),
        ("self_speculation", "snapkv", 16),
    }


def test_the_score_compares_cells_on_the_prompts_that_were_measured() -> None:
    replayed = [row(prompt=n, num_rounds=10) for n in range(3)]
    predicted_s = 10 * (4 * 0.002 + 0.04 + 0.001)
    timed = [measured(prompt=n, decode_s=[predicted_s / f] * 2) for n, f in ((0, 1.1), (1, 1.1))]
    (error,) = predict.errors([*replayed, *timed], TIMES).values()
    # Of autoregressive decoding 12 tokens at 20 ms are predicted, and 3 s were measured.
    pace = 3.0 / (12 * 0.02)
    assert error == pytest.approx((1.1 * pace - 1, 0.1, pace))
    assert predict.errors(replayed, TIMES) == {}
    found = [predict.Error(0.1, 0.3, 1.2), predict.Error(-0.5, -0.4, 0.9), predict.Error(-0.2, 0.0, 1.0)]
    assert predict.score(found) == (3, 0.2, 0.5, -0.2, 0.3, 1.0) and predict.score([]) is None


def test_steps_timed_again_count_by_their_means_view_by_view() -> None:
    slower = steps(16, 0.004).model_copy(
        update={"verify_s": {2: 0.05, 6: 0.07}, "round_s": 0.003, "ar_s": 0.04}
    )
    first, other = predict.mean_step_times([steps(16, 0.002), steps("full", 0.004), slower])
    assert (first.draft_s, first.round_s, first.ar_s) == pytest.approx((0.003, 0.002, 0.03))
    assert first.verify_s == pytest.approx({2: 0.04, 6: 0.06}) and other == steps("full", 0.004)


def test_lookup_verifies_two_tokens_where_it_finds_nothing() -> None:
    """Ten rounds, of which seven propose four tokens; looking takes 3 ms a round, however many they are."""
    looked = row("prompt_lookup", policy="none", budget=0, num_rounds=10, reached=(7, 4, 2, 1))
    times = [*TIMES, steps(0, 0.003, "prompt_lookup", "none")]
    verify_1, verify_4, rest = 0.03, 0.04, 0.001  # below γ = 2 nothing was timed: as at γ = 2
    seconds = predict.StepModel(times).seconds(looked)
    assert seconds == pytest.approx(7 * verify_4 + 3 * verify_1 + 10 * (0.003 + rest))


def predicted(drafter: str, budget: int | str, gamma: int, speedup: float, **changes: Any) -> PredictedRow:
    values: dict[str, Any] = {
        "drafter": drafter, "dataset": "code", "context": "64", "policy": "chunk_topk", "budget": budget,
        "gamma": gamma, "num_prompts": 12, "num_documents": 6, "decode_s": 1.0,
        "speedup": Interval(speedup, speedup - 0.2, speedup + 0.2),
    }  # fmt: skip
    return make(PredictedRow, **{**values, **changes})


def test_the_fastest_the_baselines_and_the_corners_are_worth_measuring() -> None:
    plane = [
        predicted("multi_view", budget, gamma, speed)
        for budget, speeds in ((16, (1.0, 1.5, 1.4)), (32, (1.1, 1.3, 1.2)), ("full", (0.8, 0.9, 0.7)))
        for gamma, speed in zip((2, 4, 8), speeds, strict=True)
    ]
    others = [
        predicted("full_only", 16, 4, 1.45),
        predicted("multi_view~2", 16, 4, 1.9),  # another training seed: lucky, and not what is deployed
        predicted("prompt_lookup", 0, 4, 0.6, policy="none"),
        predicted("prompt_lookup", 0, 8, 0.5, policy="none"),
    ]
    (here,) = by_place([*plane, *others]).values()
    found = {(c.drafter, c.budget, c.gamma) for c in worth_measuring([row.cell for row in here], FIRSTS)}
    assert found == {
        ("multi_view", 16, 4), ("full_only", 16, 4), ("multi_view", 16, 8),  # the three fastest
        ("prompt_lookup", 0, 4),
        ("multi_view", 16, 2), ("multi_view", "full", 2), ("multi_view", "full", 8),  # corners
    }  # fmt: skip


def test_the_plane_is_every_budget_and_gamma_of_one_place() -> None:
    config = Config.model_validate(MINIMAL).sweep
    plane = Plane(drafter="multi_view", dataset="code", context="64")
    sweep = config.model_copy(update={"measure": config.measure.model_copy(update={"plane": plane})})
    drafters = [Drafter(name, None, 128) for name in ("full_only", "multi_view~1", "multi_view~2")]
    assert plane_picks(sweep, PLACE, drafters) == [
        Cell("multi_view~1", "code", "64", View("chunk_topk", budget), gamma, seed=sweep.seeds[0])
        for budget in (16, 32, "full")
        for gamma in (2, 4)
    ]
    assert plane_picks(sweep, Place("code", "128"), drafters) == []
