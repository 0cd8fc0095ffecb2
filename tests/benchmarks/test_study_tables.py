"""What the page of conf/paper-small says of rows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.study import ablations, speed, tables
from benchmarks.study import families as study_families
from benchmarks.study.families import BySeed, Change, Column, Families
from pipeline.intervals import Interval
from pipeline.results.recommend import Choice, Recommendation
from pipeline.results.summary import Summary
from pipeline.store.rows import PromptRow
from tests.helpers.rows import varied
from tests.helpers.study_rows import (
    ABLATIONS,
    EMPTY,
    around,
    families,
    gain,
    make_row,
    measured,
    predicted,
    replayed,
    timed_row,
)


def test_a_difference_is_of_what_both_families_hold() -> None:
    """Seeds that one of them lacks, and prompts that any drafter lacks, count on neither side."""
    ours: BySeed = {
        "1": {"p": make_row("p", 30, 100, "d"), "q": make_row("q", 10, 50, "e"), "r": make_row("r", 50, 50)},
        "2": {"p": make_row("p", 50, 100, "d"), "q": make_row("q", 20, 50, "e")},
        "3": {"p": make_row("p", 100, 100), "q": make_row("q", 50, 50)},
    }
    theirs: BySeed = {
        "1": {"p": make_row("p", 20, 80, "d"), "q": make_row("q", 10, 20, "e")},
        "2": {"p": make_row("p", 10, 80, "d"), "q": make_row("q", 10, 20, "e")},
    }
    found = study_families.difference(ours, theirs)
    by_seed = [40 / 150 - 30 / 100, 70 / 150 - 20 / 100]
    assert found.value.mean == pytest.approx(np.mean(by_seed))
    # Every resample takes two of two documents and two of two seeds: all there can be, by hand.
    pooled = {
        ("1", "p"): 30 / 100 - 20 / 80, ("1", "q"): 10 / 50 - 10 / 20, ("1", "both"): by_seed[0],
        ("2", "p"): 50 / 100 - 10 / 80, ("2", "q"): 20 / 50 - 10 / 20, ("2", "both"): by_seed[1],
    }  # fmt: skip
    possible = [
        np.mean([pooled[first, documents], pooled[second, documents]])
        for documents in ("p", "q", "both")
        for first, second in itertools.product("12", repeat=2)
    ]
    assert (found.value.low, found.value.high) == pytest.approx((min(possible), max(possible)))
    assert found.by_seed == pytest.approx(by_seed)
    with pytest.raises(ValueError, match="no training seed or no prompt in common"):
        study_families.difference({"1": {"p": make_row("p", 1, 2)}}, {"1": {"q": make_row("q", 1, 2)}})


def test_a_difference_without_looping_texts_leaves_them_out() -> None:
    looping = varied(make_row("p", 90, 100), looping=True)
    where = "x", 64, 0.0, None
    ours = {"1": {"p": looping, "q": make_row("q", 30, 100)}}
    theirs = {"1": {"p": looping, "q": make_row("q", 20, 100)}}
    column = Column(64, 0.0, without_looping=True)
    cells: Families = {("kl", *where): ours, ("multi_view", *where): theirs}
    found = study_families.change(cells, "kl", "x", column)
    assert found and found.value.mean == pytest.approx(0.1)
    cells = {key: {"1": {"p": looping}} for key in cells}
    assert study_families.change(cells, "kl", "x", column) is None


def test_a_change_is_clear_by_its_interval_and_by_students_t() -> None:
    """t over 1, 2 and 3 points: 2 ± 4.303 · 1 ÷ √3 = 2 ± 2.48, not clear; over 2, 2.5, 3, ± 1.24, clear."""
    wide = Change(Interval(0.02, 0.01, 0.03), [0.01, 0.02, 0.03])
    assert wide.sign == 0
    narrow = Change(Interval(0.025, 0.02, 0.03), [0.02, 0.025, 0.03])
    assert narrow.sign == 1
    assert Change(Interval(-0.025, -0.03, -0.02), [-0.02, -0.025, -0.03]).sign == -1
    unsure = narrow._replace(value=Interval(0.025, -0.001, 0.03))
    assert unsure.sign == 0, "the documents differ too much"
    single = Change(Interval(0.02, 0.01, 0.03), [0.02])
    assert (single.sign, single.spread) == (1, 0) and wide.spread == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [
        ((1, 1, 0), "helps"),
        ((1, 0, 0), "is clear only in data-0 (up)"),
        ((1, 1, -1), "is clear only in data-0 (up), data-1 (up), data-2 (down)"),
        ((-1, -1, 0), "hurts"),
        ((0, 0, 0), "makes no clear difference"),
    ],
)
def test_a_change_helps_where_two_data_sets_say_so_and_none_the_contrary(
    signs: tuple[int, ...], verdict: str
) -> None:
    nothing = Change(Interval(0.0, -0.01, 0.01), [-0.001, 0.0, 0.001])

    def told(sign: int) -> Change:
        by_seed = [0.018 * sign, 0.02 * sign, 0.022 * sign]
        value = Interval(0.02 * sign, *sorted((0.01 * sign, 0.03 * sign)))
        return Change(value, by_seed) if sign else nothing

    half = Change(Interval(0.01, 0.0, 0.02), [0.01])
    rows: list[ablations.Ablation] = [
        (
            "kl",
            f"data-{k}",
            {"B = 64, greedy": told(sign), "under other_prompt": half, "B = 64, T = 1": nothing},
        )
        for k, sign in enumerate(signs)
    ]
    (line,) = ablations.ablation_words(rows).splitlines()
    greedily, sampling = line.partition(": ")[2].split("; ")
    assert greedily.startswith(f"{verdict} greedily (")
    share = {
        "helps": ", 50 to 50 % of it under other_prompt)",
        "hurts": ", -50 to -50 % of it under other_prompt)",
    }
    assert greedily.endswith(share.get(verdict, "apart)")), "only of what helps or hurts"
    assert sampling.startswith(
        "makes no clear difference at temperature 1 (+0.0 to +0.0 points, seeds up to 0.2"
    )


def test_stopping_early_is_compared_over_the_same_prompts() -> None:
    """The fastest of each kind, as the ratio of all their seconds, by hand."""

    def timed(prompt: str, gamma: int, threshold: float, seconds: float) -> PromptRow:
        return timed_row(prompt, [seconds, seconds], gamma=gamma, threshold=threshold)

    rows = [
        timed(p, gamma, threshold, seconds)
        for gamma, threshold, both in ((1, 0.0, (3, 3)), (2, 0.0, (2, 3)), (4, 0.4, (1, 3)), (8, 0.4, (4, 3)))
        for p, seconds in zip("pq", both, strict=True)
    ]
    (found,) = speed.early_stops(rows).values()
    assert (found.fixed, found.early) == (2, 4)
    assert found.ratio.mean == pytest.approx(5 / 4)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1, 2)), "either prompt drawn twice"
    words = speed.adaptive_words({("x", "1K"): found})
    assert "in 1 of 1 places, clearly in 0, and clearly slower in 0" in words


def test_the_headline_says_where_the_seeds_alone_show_it_too() -> None:
    """t reaches 2.5 points: above 0 of a mean of 8, not of 2."""
    gains = [gain(0.08, 0.06), gain(0.02, 0.01), gain(0.01, -0.01)]
    sampled = varied(gain(0.01, -0.01), temperature=1.0)
    under = varied(gain(0.06, 0.05, "other_prompt"), lost=Interval(0.02, 0.01, 0.03))
    words = tables.headline_words([*gains, sampled, under], tables.PAPER)
    assert words == (
        "Above 0 by the interval: greedy in 2 of 3 places, in 1 of them by Student's t over the training "
        "seeds too; temperature 1 in 0 of 1 places. What other_prompt does not explain is, by its own "
        "interval, greedy above 0 in 3 and below in 0 of 3 places; temperature 1 above 0 in 0 and below in 0 "
        "of 0 places."
    )
    head, _, row, *_ = tables.headline_table([*gains, under], tables.PAPER).splitlines()
    shown = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert shown["not explained by it"] == "+2.0 [+1.0, +3.0]"


def test_distilled_drafters_are_compared_with_the_one_that_they_started_from() -> None:
    """Of each data set one prompt of eight accepts nothing whatever the drafter, the others its rate."""
    rates = {("untrained", 0.0): 20, ("kl", 0.0): 60, ("multi_view", 0.0): 20}
    rates |= {("untrained", 1.0): 40, ("kl", 1.0): 40, ("multi_view", 1.0): 16}
    cells = families(rates)
    found = study_families.accepted(cells, "kl", "x", Column(64, 0.0))
    assert found.mean == pytest.approx(0.6 * 7 / 8)
    of_one = study_families.accepted(cells, "kl", "x", Column(64, 0.0, context="4K"))
    assert of_one.mean == pytest.approx(0.6 * 3 / 4)
    change = study_families.change(cells, "kl", "x", Column(64, 0.0, context="1K"), "untrained")
    assert change and change.value.mean == pytest.approx(0.4)
    greedily, sampling = ablations.distilled_words(cells, ABLATIONS).splitlines()
    assert greedily == (
        "- Greedily, accepted more than `untrained`: `kl` (+35.0 to +35.0); "
        "neither clearly: `multi_view` (+0.0 to +0.0)"
    )
    assert sampling == (
        "- At temperature 1, no distillation here beats the drafter as it was pretrained; "
        "accepted less: `multi_view` (-21.0 to -21.0); neither clearly: `kl` (+0.0 to +0.0)"
    )
    table = ablations.accepted_table(cells, ABLATIONS).splitlines()
    assert table[4].startswith("| `kl` | x | 52.5 [") and "| +35.0 [" in table[4]


def test_scaled_rope_is_compared_context_by_context() -> None:
    names = list(ablations.scaled_only(ABLATIONS))
    assert ablations.beyond_range(ABLATIONS) == ["2K", "4K"]
    config = ABLATIONS.model_copy(
        update={"data": ABLATIONS.data.model_copy(update={"contexts": (ABLATIONS.data.contexts[2],)})}
    )
    rates = {(name, temperature): 10 for name in names for temperature in (0.0, 1.0)}
    rates |= {("untrained", 0.0): 30, ("untrained", 1.0): 10}
    cells = families(rates)
    first = ablations.rope_table(cells, config).splitlines()[2]
    assert first.startswith(f"| `{names[0]}` | linear, factor 4 | x | 4K | -15.0 [")
    for line in ablations.rope_words(cells, config).splitlines():
        assert "(of 2)" in line
        assert line.endswith(
            "B = 64, greedy: 0 / 2; B = 64, T = 1: 0 / 0; B = full, greedy: 0 / 2; B = full, T = 1: 0 / 0"
        )


def test_a_drafter_that_was_not_distilled_stands_under_every_seed() -> None:
    rows = [
        varied(make_row("p", 1, 2), drafter=name)
        for name in ("untrained", "kl~42", "kl~43", "kl~44", "one_view")
    ]
    studies = {name: EMPTY for name in study_families.RUNS} | {"ablations": replace(EMPTY, rows=rows)}
    cells = study_families.families_of(studies)
    seeds = {name: sorted(by_seed) for (name, *_), by_seed in cells.items()}
    assert seeds == {"untrained": ["42", "43", "44"], "kl": ["42", "43", "44"], "one_view": ["42"]}


def test_each_baseline_stands_with_its_fastest_measured_cell() -> None:
    cells = [
        measured("self_speculation", 0.9),
        measured("self_speculation", 1.2, budget=512),
        measured("self_speculation", 1.05, context="1K"),
        replayed("self_speculation"),
        measured("prompt_lookup", 0.8),
        measured("multi_view~42", 2.0),
    ]
    best = speed.best_baselines(cells)
    assert [(c.cell.drafter, c.cell.context, c.speed.speedup.mean) for c in best] == [
        ("self_speculation", "4K", 1.2), ("self_speculation", "1K", 1.05), ("prompt_lookup", "4K", 0.8)
    ]  # fmt: skip
    table = speed.baseline_table(best)
    assert "self_speculation, streaming, B = 512, γ = 4 | 50.0 [40.0, 60.0] | 1.20 [1.10, 1.30]" in table
    words = speed.baseline_words(best)
    assert "`self_speculation` in 1 of 2 places, `prompt_lookup` in 0 of 1 places" in words


def test_predicted_speedups_are_told_against_measured_ones() -> None:
    """1.2 ÷ 1 and 0.9 ÷ 1.2: off by +20 % and -25 %, and a third at +0 %; the fourth was not measured."""
    cells = [measured("a", 1.0), measured("b", 1.2), measured("c", 1.0)]
    told = [predicted("a", 1.2), predicted("b", 0.9), predicted("c", 1.0), predicted("d", 9.0)]
    words = tables.prediction_words(replace(EMPTY, cells=cells, predicted=told))
    assert "Of the same 3 cells" in words
    assert "+0.0 % off the measured ones" in words and "-25.0 % at worst" in words


def test_the_grid_says_how_many_texts_loop_and_what_is_accepted_of_the_others() -> None:
    cells = [replayed("multi_view~42", policy="chunk_topk", num_prompts=32)]
    told = [predicted("multi_view~42", 1.2, policy="chunk_topk")]
    head, _, row = tables.grid_table(replace(EMPTY, cells=cells, predicted=told)).splitlines()
    shown = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert shown["looping"] == "2 of 32"
    assert shown["multi_view, greedy, without looping texts"] == "45.0"


def test_what_to_deploy_has_the_intervals_of_run_off_and_fresh_repeats() -> None:
    """End to end is of the fresh repeats where there are any, and of the first measurement elsewhere."""
    raced, other = measured("a", 1.2), measured("b", 1.1)
    choice, runner_up = (
        Choice(
            cell=row.cell, speedup=Interval(1.2, 1.1, 1.3), run_off=run_off, again=None, end_to_end=1.0,
            num_documents=6, acceptance=0.5, drafter_kv_bytes=1,
        )
        for row, run_off in ((raced, 1.25), (other, None))
    )  # fmt: skip
    given = replace(
        EMPTY,
        cells=[raced, other],
        run_off=[varied(raced, speedup=Interval(1.25, 1.1, 1.3))],
        again=[varied(raced, end_to_end=Interval(1.0, 0.95, 1.1))],
    )
    for advised, shown in ((choice, "1.25 [1.10, 1.30]"), (runner_up, "")):
        advice = Recommendation(
            dataset="x", context="4K", choice=advised, runner_up=None, why="", num_again=0, best_again=None
        )
        summary = Summary.model_construct(recommendations=(advice,))
        row = speed.advice_table(replace(given, summary=summary)).splitlines()[2].split(" | ")
        assert row[4] == shown
        assert row[7] == ("1.00 [0.95, 1.10]" if shown else "1.00 [0.90, 1.10]")
    again = [raced, varied(other, speedup=around(1.21))]
    twice = replace(given, run_off=[*given.run_off, other], again=again)
    # 1.25 to 1.20 and 1.10 to 1.21.
    assert "2 cells moved by 7.0 % in the median and by 10.0 % at most" in speed.advice_words(twice)
