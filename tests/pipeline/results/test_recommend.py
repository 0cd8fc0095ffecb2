"""What is recommended or refused of cells made by hand, and the memory that it takes."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.commands.recommend import lines
from pipeline.axes import Place
from pipeline.errors import BadData
from pipeline.intervals import Interval
from pipeline.results.pool import cell_rows
from pipeline.results.recommend import Choice, Needs, choices, recommend, settings_text
from pipeline.store.rows import CellRow, ModelSize, PromptRow
from tests.helpers.report import AXES, measured, row
from tests.helpers.rows import make, varied

PLACE = Place("code", "64")
SIZES = {
    "target": ModelSize(name="target", weight_bytes=10_000, kv_bytes_per_token=100),
    "multi_view": ModelSize(name="multi_view", weight_bytes=500, kv_bytes_per_token=20),
    "cascade": ModelSize(name="cascade", weight_bytes=300, kv_bytes_per_token=120),
}


def choice(speedup: float, low: float, again: tuple[float, float] | None = None, **changes: Any) -> Choice:
    """Speedup and the low end of its interval, first and on fresh repeats."""
    values: dict[str, Any] = {
        "drafter": "multi_view", "dataset": "code", "context": "64", "policy": "chunk_topk", "budget": 16,
        "gamma": 4, "speedup": Interval(speedup, low, speedup + 0.2),
        "again": Interval(*again, again[0] + 0.05) if again else None, "end_to_end": 1.0, "num_documents": 6,
        "acceptance": 0.5, "acceptance_mode": "replay", "drafter_kv_bytes": 1000,
    }  # fmt: skip
    return make(Choice, **{**values, **changes})


# ── which cell ────────────────────────────────────────────────────────────────────────────────────


def test_choices_are_measured_cells_with_their_fresh_repeats() -> None:
    """Fastest first by the first measurement, whatever the fresh repeats say.

    Acceptance is the replay's, which has more prompts.
    """
    rows: list[PromptRow] = [row(prompt=n, budget=b, accepted=6) for n in range(12) for b in (16, "full")]
    rows += [measured(prompt=n, budget=16) for n in range(6)]  # 1.5 times the speed of AR
    rows += [measured(prompt=n, budget="full", decode_s=[1.5, 1.5]) for n in range(6)]
    again = [measured(prompt=n, budget="full", decode_s=[2.5, 2.5]) for n in range(6)]
    cells, fresh = cell_rows(rows, AXES, 100, 0), cell_rows(again, AXES, 100, 0)
    fast, slow = choices(cells, [], fresh)[PLACE]
    assert (fast.cell.budget, slow.cell.budget) == ("full", 16)
    assert (fast.speedup.mean, fast.again.mean) == pytest.approx((2.0, 1.2)) and fast.expected == fast.again
    assert slow.speedup.mean == pytest.approx(1.5) and slow.again is None and slow.expected == slow.speedup
    assert fast.acceptance == pytest.approx(0.6) and fast.num_documents == 3
    # With prefills of 1.5 s and of AR's 1 s: of the fresh repeats, where there are any.
    assert fast.end_to_end == pytest.approx((1.0 + 3.0) / (1.5 + 2.5))
    assert slow.end_to_end == pytest.approx((1.0 + 3.0) / (1.5 + 2.0))


def test_a_run_off_decides_between_the_fastest() -> None:
    """Whatever was measured first; a cell that was in none comes behind those that were, however fast."""
    speeds = {"full": (2.6, 1.5), 32: (1.9, 1.7), 16: (1.85, None)}  # first, run-off

    def rows(place: int) -> list[CellRow]:
        made = [
            measured(prompt=n, budget=budget, decode_s=[3.0 / times[place]] * 2)
            for n in range(6)
            for budget, times in speeds.items()
            if times[place] is not None
        ]
        return cell_rows(made, AXES, 100, 0)

    found = choices(rows(0), rows(1), [])[PLACE]
    assert [cell.cell.budget for cell in found] == [32, "full", 16]
    assert [cell.run_off for cell in found] == [pytest.approx(1.7), pytest.approx(1.5), None]
    assert [cell.cell.budget for cell in choices(rows(0), [], [])[PLACE]] == ["full", 32, 16]


def test_a_fast_first_run_shows_nothing_where_the_repeats_behind_the_run_off_failed() -> None:
    lucky, sound = choice(2.6, 2.4, run_off=1.5), choice(1.9, 1.8, (1.4, 1.3), budget=32, run_off=1.4)
    found = recommend(PLACE, [lucky, sound], 5)
    assert found.choice == sound
    assert found.why == (
        "the fastest of 2 measured cells, by a run-off between 2, leaving out 1 not shown to be faster than "
        "autoregressive decoding"
    )
    assert found.runner_up is None
    alone = recommend(PLACE, [lucky, choice(1.3, 1.2, gamma=1)], 5)
    assert (alone.choice, alone.runner_up) == (None, None)
    assert alone.why == "no fresh repeats of the fastest cells (they failed): run the stage sweep again"


def test_behind_cells_that_regressed_a_first_measurement_shows_nothing() -> None:
    """Neither of a cell that failed both times nor of one that was too slow to be measured again."""
    regressed = choice(1.9, 1.8, (1.0, 0.9), run_off=1.1)
    failed, unraced = choice(2.6, 2.4, budget=32), choice(1.3, 1.2, gamma=1)
    advice = recommend(PLACE, [regressed, failed, unraced], 5)
    assert advice.choice is None and advice.runner_up == regressed
    assert "the best measured cell is at 1.00× [0.90, 1.05]" in advice.why
    # Where the needs leave none that was measured again, the first measurement has to do, and it is said.
    small = varied(unraced, acceptance=0.9)
    advice = recommend(PLACE, [regressed, failed, small], 5, Needs(48, 16, min_acceptance=0.6))
    assert advice.choice == small and "by the run-off" not in advice.why


def test_a_run_off_that_lost_prompts_is_not_compared() -> None:
    rows = [measured(prompt=n, budget=b, decode_s=[1.5, 1.5]) for n in range(6) for b in (16, "full")]
    raced = [measured(prompt=0, budget="full", decode_s=[0.5, 0.5])]
    raced += [measured(prompt=n, budget=16, decode_s=[2.0, 2.0]) for n in range(6)]
    cells, run_off = cell_rows(rows, AXES, 100, 0), cell_rows(raced, AXES, 100, 0)
    assert [(c.cell.budget, c.run_off) for c in choices(cells, run_off, [])[PLACE]] == [
        (16, pytest.approx(1.5)), ("full", None)
    ]  # fmt: skip


def test_acceptance_is_measured_where_replay_cannot_know_it() -> None:
    """Of a cell that stops early, and such a cell is not out for an acceptance that it has."""
    rows = [row(prompt=n, accepted=6, proposed=None, threshold=0.4) for n in range(12)]
    rows += [measured(prompt=n, accepted=7, threshold=0.4) for n in range(12)]
    (found,) = choices(cell_rows(rows, AXES, 100, 0), [], [])[PLACE]
    assert (found.acceptance, found.acceptance_mode) == (pytest.approx(0.7), "measure")
    assert recommend(PLACE, [found], 5, Needs(48, 16, min_acceptance=0.6)).choice == found
    assert recommend(PLACE, [found], 5, Needs(48, 16, min_acceptance=0.8)).choice is None


def test_documents_that_share_a_clock_are_one() -> None:
    rows = [measured(prompt=n, together_with="p0", prompts_together=6) for n in range(6)]
    (found,) = choices(cell_rows(rows, AXES, 100, 0), [], [])[PLACE]
    assert found.num_documents == 1


def test_the_first_that_fresh_repeats_bear_out_is_recommended() -> None:
    """Not the best of the repeats; those before it are counted, and the next is one that passes too."""
    failed, second = choice(1.5, 1.3, (1.02, 0.99)), choice(1.4, 1.3, (1.25, 1.2), gamma=3)
    third, low = choice(1.3, 1.1, (1.35, 1.3), gamma=2), choice(1.2, 0.9, gamma=1)
    advice = recommend(PLACE, [failed, second, third, low], 5)
    assert (advice.choice, advice.runner_up, advice.best_again) == (second, third, 1.35)
    left_out = "leaving out 1 not shown to be faster than autoregressive decoding"
    assert advice.why == f"the fastest of 4 measured cells, {left_out}"
    # None other passes: of those that were measured again the best is next, of the others where it is alone.
    assert recommend(PLACE, [failed, second, low], 5).runner_up == failed
    assert recommend(PLACE, [second, low], 5).runner_up == low
    # Cells over too few documents are passed over, however fast.
    few = choice(1.6, 1.5, (1.6, 1.5), num_documents=4)
    assert recommend(PLACE, [few, failed, second], 5).choice == second


def test_none_that_passes_names_the_best_by_what_counts() -> None:
    """The fastest at first is the slower one on fresh repeats; it is also not called the next."""
    fast, slow = choice(1.5, 1.3, (1.01, 0.97)), choice(1.4, 1.3, (1.05, 0.98), gamma=2)
    advice = recommend(PLACE, [fast, slow], 5)
    said = "do not speculate here: the best measured cell is at 1.05× [0.98, 1.10] of autoregressive decode"
    assert advice.choice is None and advice.runner_up == slow and advice.why.startswith(said)
    (_, why, best, _) = lines(advice, Needs(48, 16), SIZES, PLACE)
    assert why == f"  {advice.why}" and best.startswith(
        "  best    multi_view, chunk_topk, B = 16, γ = 2: 1.05×"
    )
    unraced = [choice(1.5, 1.3), choice(1.4, 1.3, gamma=2)]
    shown = list(lines(recommend(PLACE, unraced, 5), Needs(48, 16), SIZES, PLACE))
    assert [line[:10].strip() for line in shown if line[2:10].strip()] == ["code, 64:", "deploy", "next"]
    accurate = varied(fast, acceptance=0.9)
    of_the_allowed = recommend(PLACE, [accurate, slow], 5, Needs(48, 16, min_acceptance=0.6)).why
    assert "the best measured cell that the needs allow is at 1.01×" in of_the_allowed


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"low": 0.99}, "do not speculate here: the best measured cell is at 1.20× [0.99, 1.40]"),
        (
            {"low": 1.1, "again": (1.05, 0.98)},
            "do not speculate here: the best measured cell is at 1.05× [0.98",
        ),
        ({"low": 1.1, "num_documents": 4}, "too few documents to rank (4 of at least 5)"),
    ],
)
def test_what_is_not_shown_to_be_faster_is_not_recommended(changes: dict[str, Any], why: str) -> None:
    advice = recommend(PLACE, [choice(1.2, **changes)], 5)
    assert advice.choice is None and advice.runner_up is not None and advice.why.startswith(why)
    assert recommend(PLACE, [], 5).choice is None


def test_a_first_measurement_alone_is_said_to_be_high() -> None:
    said = "by its first measurement alone, rather high as it was picked from 2"
    once, other = choice(1.4, 1.3), choice(1.2, 1.15, gamma=2)
    advice = recommend(PLACE, [once, other], 5)
    assert advice.choice == once and advice.why == f"the fastest of 2 measured cells, {said}"
    assert any(said in line for line in lines(advice, Needs(48, 16), SIZES, PLACE))
    twice = varied(other, again=Interval(1.2, 1.15, 1.25))
    assert recommend(PLACE, [once, twice], 5).choice == twice
    assert "first measurement" not in recommend(PLACE, [once, twice], 5).why
    assert "first measurement" not in recommend(PLACE, [once], 5).why, "nothing was picked"


def test_the_settings_of_a_cell() -> None:
    assert settings_text(choice(1.2, 1.1).cell) == "multi_view, chunk_topk, B = 16, γ = 4"
    whole = choice(1.2, 1.1, budget="full", threshold=0.25)
    assert settings_text(whole.cell) == "multi_view, chunk_topk, B = full, γ = 4, stopping under 0.25"
    rolling = whole.cell.vary(policy="window", budget=64, sinks=4, threshold=0.0)
    assert settings_text(rolling) == "multi_view, window, B = 64, 4 of them sinks, γ = 4"
    again = whole.cell.vary(policy="target_guided", budget=64, refresh=8, threshold=0.0)
    assert "B = 64, chosen again after every 8 rounds, γ" in settings_text(again)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────


def test_the_fastest_that_is_allowed_is_recommended() -> None:
    here = [choice(2.0, 1.5, budget=64, drafter_kv_bytes=4000, acceptance=0.3), choice(1.8, 1.4)]
    free = recommend(PLACE, here, 5)
    assert free.choice == here[0] and free.runner_up == here[1]
    # Weights 10,500, and per text 64 × 100 of the target beside 4,000 or 1,000 of the drafter's prefix and
    # 16 × 20 of its continuation.
    for memory, best in ((10_500 + 2 * 10_720, here[0]), (10_500 + 2 * 10_719, here[1])):
        needs = Needs(48, 16, memory_bytes=memory, concurrency=2)
        assert recommend(PLACE, here, 5, needs, SIZES).choice == best
    assert recommend(PLACE, here, 5, Needs(48, 16, min_acceptance=0.4), SIZES).choice == here[1]


@pytest.mark.parametrize(
    ("changes", "kv", "weights"),
    [
        ({}, 1000 + 16 * 20, 10_500),
        ({"budget": "full", "drafter_kv_bytes": 640}, 64 * 20, 10_500),  # as long as the whole text
        ({"drafter": "self_speculation", "policy": "snapkv"}, 1000 + 16 * 100, 10_000),
        ({"drafter": "cascade", "policy": "snapkv"}, 1000 + 16 * 120, 10_300),  # of drafter and middle
        ({"drafter": "prompt_lookup", "policy": "none", "budget": 0, "drafter_kv_bytes": 0}, 0, 10_000),
    ],
)
def test_memory_of_every_kind_of_draft_source(changes: dict[str, Any], kv: int, weights: int) -> None:
    """A budget is of the prefix alone: every token of the continuation is kept besides."""
    cell, needs = choice(2.0, 1.5, **changes), Needs(48, 16, concurrency=3)
    assert needs.drafter_bytes(cell, SIZES) == kv
    assert needs.bytes_of(cell, SIZES) == weights + 3 * (64 * 100 + kv)


@pytest.mark.parametrize(
    ("memory", "end"),
    [(16_900, "needs 1.64e-05 GB"), (16_000, "needs 1.64e-05 GB, which does not fit either")],
)
def test_a_refusal_for_memory_says_what_would_do(memory: int, end: str) -> None:
    """16,400 bytes of the target for a text; the drafters of 500 and 1,320 or 4,320 more."""
    here = [choice(2.0, 1.5, budget=64, drafter_kv_bytes=4000), choice(1.8, 1.4)]
    advice = recommend(PLACE, here, 5, Needs(48, 16, memory_bytes=memory), SIZES)
    assert advice.choice is None and advice.why == (
        "do not speculate here: every measured cell is out for memory; those out for memory need at least "
        f"1.822e-05 GB, the limit is {memory / 1e9:.4g} GB; autoregressive decoding alone {end}"
    )


def test_a_size_that_is_not_known_is_not_nothing() -> None:
    cell, target = choice(2.0, 1.5), {"target": SIZES["target"]}
    with pytest.raises(BadData, match="do not say how large multi_view is"):
        recommend(PLACE, [cell], 5, Needs(48, 16, memory_bytes=1e9), target)
    with pytest.raises(BadData, match="do not say how large target is"):
        recommend(PLACE, [cell], 5, Needs(48, 16, memory_bytes=1e9), {"multi_view": SIZES["multi_view"]})
    shown = "\n".join(lines(recommend(PLACE, [cell], 5), Needs(48, 16), target, PLACE))
    assert "drafter 1000 B of the prefix; the rest is not known" in shown
    assert "lack the size of multi_view" in shown
