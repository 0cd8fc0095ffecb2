"""What the verdicts say."""

from dataclasses import astuple, replace

import pytest

from pipeline.config.sweep import Plane
from pipeline.intervals import Interval
from pipeline.results.findings import summarise
from pipeline.results.pool import cell_rows
from pipeline.results.scores import Predictions
from pipeline.results.summary import Summary
from pipeline.store.rows import FailedCell, ModelSize, PredictedRow, StepTimes
from tests.helpers.report import AXES, measured, row, sweep_rows
from tests.helpers.rows import make

CELL = {"drafter", "dataset", "context", "view", "gamma", "threshold", "temperature", "seed", "kind", "rule"}
VIEW = {"policy", "budget", "control", "sinks", "refresh", "positions"}


def summary_of(rows, failed=(), axes=AXES) -> Summary:
    return summarise(rows, cell_rows(rows, axes, 500, 0), failed, axes, samples=500, seed=0)


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summary_of(sweep_rows())


def gain(summary: Summary, **wanted):
    """The one gain whose cell is as wanted, over these prompts."""
    over = wanted.pop("prompts", None)
    found = [g for g in summary.headline if g.cell == g.cell.vary(**wanted) and over in (None, g.prompts)]
    assert len(found) == 1
    return found[0]


def test_summary_holds_what_other_programs_ask_for(summary):
    plain = summary.model_dump(mode="json")
    assert set(plain) >= {
        "stages",
        "lossless",
        "acceptance",
        "speedup",
        "compile_s",
        "ar_tokens_per_s",
        "headline",
        "families",
        "findings",
    }
    assert plain["lossless"] == {"prompts": 2, "exact": 2, "explained": 0, "left_out_tokens": 0}
    assert plain["replay_check"] == {"rows": 8, "equal": 8}
    for name in ("acceptance", "speedup"):
        for line in plain[name]:
            assert set(line) == {"cell", "value", "num_prompts", "num_documents"}
            assert set(line["cell"]) == CELL and set(line["cell"]["view"]) == VIEW
            assert set(line["value"]) == {"mean", "low", "high"}
    views = [line["cell"]["view"] for line in plain["acceptance"]]
    assert {view["budget"] for view in views} == {16, "full"}
    assert {view["control"] for view in views} == {None, "other_prompt"}
    assert Summary.model_validate(plain) == summary


def test_gain_at_the_smallest_budget_and_at_the_full_cache(summary):
    # Ten prompts of 60 against 40 of 100 and two loops of 95 each.
    small = gain(summary, budget=16, gamma=4, control=None, prompts="all")
    assert (small.cell.drafter, small.baseline) == ("multi_view", "full_only")
    assert small.value.mean == pytest.approx(0.20 * 10 / 12)
    assert 0 < small.value.low < small.value.mean < small.value.high
    full = gain(summary, budget="full", gamma=4, control=None, prompts="all")
    assert full.value.mean == pytest.approx(-0.01 * 10 / 12)


def test_gain_without_looping_prompts_and_under_the_control(summary):
    varied = gain(summary, budget=16, gamma=4, control=None, prompts="not_looping")
    assert (varied.value.mean, varied.num_prompts, varied.num_documents) == (pytest.approx(0.20), 10, 5)
    control = gain(summary, budget=16, gamma=4, control="other_prompt")
    assert control.value.mean == pytest.approx(-0.10 * 10 / 12)


def test_gain_takes_the_prompts_that_both_drafters_have():
    rows = [row("full_only", p, 40, 100) for p in range(5)] + [
        row("multi_view", p, 60, 100) for p in range(2, 9)
    ]
    small = gain(summary_of(rows), budget=16, prompts="all")
    assert (small.num_prompts, small.value.mean) == (3, pytest.approx(0.2))


def test_gap_to_the_control(summary):
    gaps = {(g.cell.drafter, g.cell.budget): g.value for g in summary.controls if g.cell.gamma == 4}
    assert gaps["multi_view", 16].mean == pytest.approx(0.30 * 10 / 12)
    assert gaps["full_only", 16].mean == pytest.approx(0.0)


def test_findings_say_what_the_figures_say(summary):
    text = "\n".join(summary.findings)
    assert "multi_view against full_only accepts +16.7 points" in text and "at B = 16 (better)" in text
    assert "Without looping prompts (10 left): +20.0 points" in text
    assert ": without the context it is the other way round." in text
    assert (
        "by full_only, the context is not being used at B = 16 (+0.0 points [+0.0, +0.0] over another" in text
    )
    assert "by multi_view, the context is used at B = 16 (+25.0 points" in text
    assert "over 12 prompts of 6 documents." in text
    assert "All 2 greedy prompts equal" in text
    assert "code 64 2 of 12" in text
    assert "trained on" not in text and "failed" not in text and "Replay" not in text


@pytest.mark.parametrize(
    ("kept", "said"),
    [(53, "75 % of the gain is there"), (62, "120 % of the gain"), (36, "the other way round")],
)
def test_share_of_a_gain_that_the_control_keeps(kept, said):
    """As it is: more than all where another document's KV gains more."""
    rows = []
    for prompt in range(20):
        rows += [
            row("full_only", prompt, 40, 100), row("multi_view", prompt, 60, 100),
            row("full_only", prompt, 38, 100, control="other_prompt"),
            row("multi_view", prompt, kept, 100, control="other_prompt"),
        ]  # fmt: skip
    assert said in "\n".join(summary_of(rows).findings)


def test_a_share_below_nothing_is_shown_as_it_is() -> None:
    """+10 points, of which the control leaves -1 on average, +9 or -11 by document."""
    rows = []
    for prompt in range(20):
        kept = 39 if prompt // 2 % 2 else 59
        rows += [
            row("full_only", prompt, 50, 100), row("multi_view", prompt, 60, 100),
            row("full_only", prompt, 50, 100, control="other_prompt"),
            row("multi_view", prompt, kept, 100, control="other_prompt"),
        ]  # fmt: skip
    found = summary_of(rows)
    said = (
        ": -10 % of the gain is there without the context (by an interval that reaches zero), +11.0 points ["
    )
    assert said in "\n".join(found.findings)
    (under,) = (g for g in found.headline if g.cell.control)
    lost = under.lost
    assert lost.mean == pytest.approx(0.11) and 0.01 <= lost.low < lost.mean < lost.high <= 0.21


def test_what_a_gain_loses_under_the_control_is_paired():
    """Over 20 prompts that differ much, 10 and 15 points by seed of 20 and 25: the same 10 in each."""
    rows = []
    for prompt in range(20):
        easy = 3 * (prompt % 7)
        for seed, (real, other) in {1: (20, 10), 2: (25, 15)}.items():
            for control, gain in ((None, real), ("other_prompt", other)):
                rows += [
                    row(f"full_only~{seed}", prompt, 30 + easy, 100, control=control),
                    row(f"multi_view~{seed}", prompt, 30 + easy + gain, 100, control=control),
                ]
    drafters = ("full_only~1", "full_only~2", "multi_view~1", "multi_view~2")
    found = summary_of(rows, axes=replace(AXES, drafters=drafters))
    (family,) = (g for g in found.families if g.cell.control)
    assert astuple(family.lost) == pytest.approx((0.1, 0.1, 0.1))
    assert all(astuple(g.lost) == pytest.approx((0.1, 0.1, 0.1)) for g in found.headline if g.cell.control)
    assert all(g.lost is None for g in (*found.headline, *found.families) if not g.cell.control)
    said = "56 % of the gain is there without the context, +10.0 points [+10.0, +10.0] of it are not."
    assert said in found.findings[0]


def test_too_few_documents_are_not_ranked():
    """6 documents, of which 1 is measured: figures, but no verdicts below a limit."""
    rows, ranked = sweep_rows(), ("better", "worse", "fastest", "% of the gain", "is used", "not being used")
    strict = "\n".join(summary_of(rows, axes=replace(AXES, least_documents=7)).findings)
    assert not any(word in strict for word in ranked)
    assert (
        "accepts +16.7 points" in strict
        and "at B = 16: too few documents to rank (6 of at least 7)" in strict
        and "4 cells were measured, at 1.50× to 1.50×" in strict
        and "+25.0 points" in strict
    )
    default = "\n".join(summary_of(rows).findings)
    assert "(better)" in default and "is used" in default
    assert "too few documents to rank (1 of at least 5)" in default and "fastest" not in default
    lax = "\n".join(summary_of(rows, axes=replace(AXES, least_documents=1)).findings)
    assert ": 1.50× [1.50, 1.50], the fastest of 4 measured cells, by its first measurement alone" in lax
    assert "too few" not in lax


def test_sampled_cells_are_said_to_be_faster_or_not():
    """For them nothing is recommended; the first of 12 prompts in 6 documents is 1.5 times as fast as AR."""
    rows = [
        measured(prompt=p, temperature=1.0, exact=None, gamma=g, decode_s=[seconds] * 2)
        for p in range(12)
        for g, seconds in ((2, 4.0), (4, 2.0))
    ]
    (text,) = (text for text in summary_of(rows).findings if "shown to be faster" in text)
    assert text == (
        "code, 64, temperature 1: 1 of 2 measured cells are shown to be faster than autoregressive decoding; "
        "the fastest, rather high as it was picked from them, is full_only, chunk_topk, B = 16, γ = 4 at "
        "1.50× [1.50, 1.50]."
    )
    slow = [one for one in rows if one.cell.gamma == 2]
    assert any(": none of 1 measured" in text for text in summary_of(slow).findings)
    few = summary_of(rows, axes=replace(AXES, least_documents=7)).findings
    assert not any("faster" in text for text in few)


def test_documents_decoded_together_count_once():
    rows = [measured(prompt=2 * p, together_with="p0", prompts_together=6) for p in range(6)]
    found = summary_of(rows)
    (speed,), (ar,), (acceptance,) = found.speedup, found.ar_tokens_per_s, found.acceptance
    assert (speed.num_prompts, speed.num_documents, ar.num_documents) == (6, 1, 1)
    assert acceptance.num_documents == 6
    assert "too few documents to rank (1 of at least 5)" in "\n".join(found.findings)


def test_family_finding_speaks_for_its_drafters():
    """Two training seeds: +20 and +10 points, of which another document's KV leaves 12 and 3."""
    accepted = {
        "a~1": (40, 40), "a~2": (45, 45), "b~1": (60, 52), "b~2": (55, 48), "once": (30, 30),
    }  # fmt: skip
    rows = [
        row(drafter, prompt, kept, 100, control=control)
        for drafter, both in accepted.items()
        for control, kept in zip((None, "other_prompt"), both, strict=True)
        for prompt in range(20)
    ]
    found = summary_of(rows, axes=replace(AXES, drafters=tuple(accepted)))
    text = found.findings[0]
    assert "b against a accepts +15.0 points [+10.0, +20.0] at B = 16 (better)" in text
    assert (
        "over 20 prompts of 10 documents and 2 training seeds (by seed +20.0, +10.0 at B = 16; "
        "intervals that resample so few seeds are rough)."
    ) in text
    assert "With another document's KV in place of the context: +7.5 points [+3.0, +12.0]" in text
    assert "50 % of the gain is there without the context" in text
    told = [text.split(" accepts ")[0].split(": ")[1] for text in found.findings if " accepts " in text]
    assert told == ["b against a", "once against a~1", "once against b~1"]


def test_no_prefix_counts_only_for_a_drafter_trained_so():
    rows = [row(prompt=p, accepted=50, proposed=100) for p in range(12)]
    rows += [row(prompt=p, accepted=20, proposed=100, budget=0, control="no_prefix") for p in range(12)]
    found = summary_of(rows)
    (gap,) = found.controls
    assert (gap.value.mean, gap.cell.budget, gap.real_budget) == (pytest.approx(0.3), 0, 16)
    assert not any("no prefix" in text for text in found.findings)
    trained = replace(AXES, trained_without_prefix=("full_only",))
    assert any(
        "the context is used at B = 16 (+30.0 points [+30.0, +30.0] over no prefix" in text
        for text in summary_of(rows, axes=trained).findings
    )


def test_doubts_are_told():
    failed = make(
        FailedCell, drafter="full_only", dataset="code", context="64", policy="all", budget="full", gamma=0,
        mode="replay", prompt_id="p9", error="RuntimeError: not finite",
    )  # fmt: skip
    empty = row("multi_view", accepted=0, proposed=0, num_rounds=0, reached=(0,) * 4, kept=(0,) * 4)
    text = "\n".join(summary_of([row(in_trained_range=False), empty], [failed]).findings)
    assert "1 cells or prompts failed" in text
    assert "At 64, outside the positions that they were trained on: full_only." in text
    assert "1 of 1 cells have fewer than 10 documents" in text
    assert "1 cells are left out, as nothing was proposed in them" in text
    early = row("multi_view", proposed=None, threshold=0.5)  # replay does not know what it proposed
    assert "left out" not in "\n".join(summary_of([early]).findings)


def test_sweep_without_rows_has_nothing_to_find():
    assert summary_of([]).findings == []


def test_a_drafter_that_could_not_be_timed_is_named():
    """Its cells were replayed, and no prediction stands for them where others have one."""
    rows = sweep_rows()
    replayed = [
        cell for cell in cell_rows(rows, AXES, 10, 0) if cell.mode == "replay" and not cell.cell.control
    ]
    lost, *others = sorted({cell.cell.drafter for cell in replayed})
    predicted = [
        PredictedRow(
            cell=one.cell, num_prompts=1, num_documents=1, decode_s=1.0, speedup=Interval(1.0, 1.0, 1.0)
        )
        for one in replayed
        if one.cell.drafter in others
    ]
    sizes = [ModelSize(name="target", weight_bytes=1, kv_bytes_per_token=1)]
    context = replayed[0].cell.context

    def told(predictions: Predictions) -> list[str]:
        found = summarise(rows, cell_rows(rows, AXES, 10, 0), (), AXES, 10, 0, predictions).findings
        return [text for text in found if "no speed is predicted" in text]

    (text,) = told(Predictions(predicted=predicted, sizes=sizes))
    assert text.startswith(f"{context}: no speed is predicted for {lost}, whose steps could not be timed")
    assert told(Predictions()) == [], "a sweep that predicts nothing has nothing to say of it"


def test_a_plane_is_scored_by_the_steps_it_was_predicted_from_and_by_those_beside_it():
    """A machine that has become twice as slow since: the formula is right, and what it predicted is half."""
    predicted_s = 10 * (4 * 0.002 + 0.04 + 0.001)
    rows = [row(num_rounds=10), measured(decode_s=[2 * predicted_s] * 2)]
    before = StepTimes(
        context="64", prompt_tokens=64, kind="drafter", policy="chunk_topk", budget=16, draft_s=0.002,
        verify_s={2: 0.03, 6: 0.05}, round_s=0.001, ar_s=0.02,
    )  # fmt: skip
    beside = before.model_copy(
        update={"draft_s": 0.004, "verify_s": {2: 0.06, 6: 0.1}, "round_s": 0.002, "ar_s": 0.04}
    )
    plane = Plane(drafter="full_only", dataset="code", context="64")

    def told(predictions: Predictions) -> tuple[list[str], list[str]]:
        summary = summarise(rows, cell_rows(rows, AXES, 10, 0), (), AXES, 10, 0, predictions)
        return [s.what for s in summary.prediction], [t for t in summary.findings if "decode times" in t]

    whats, (text,) = told(Predictions(times=[before], beside=[beside], plane=plane))
    assert whats == ["plane", "plane by earlier steps"]
    assert text.startswith("Predicted decode times are off by 50 % in the median of the 1 cells of the plane")
    assert text.endswith("by single steps timed between the plane's prompts, they would be off by 0 %.")
    whats, (text,) = told(Predictions(times=[before], plane=plane))
    assert whats == ["plane by earlier steps"] and text.endswith("that all predictions are made of.")
