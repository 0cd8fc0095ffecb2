"""The summaries that are committed, which were written in format 2."""

from __future__ import annotations

import json
from dataclasses import astuple
from typing import Any

import pytest

from pipeline.results.summary import Estimate, Summary, read_summary
from tests.helpers.paths import ROOT

STUDIES = ("paper-small", "paper-small-800")
AXES = ("drafter", "dataset", "context", "gamma", "threshold", "temperature", "seed")


def summary_of(study: str) -> tuple[dict[str, Any], Summary]:
    file = ROOT / "docs" / "results" / study / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")), read_summary(file)


def flat(estimate: Estimate) -> dict[str, Any]:
    """As format 2 had it."""
    cell, value = estimate.cell, estimate.value
    views = {"policy": cell.policy, "budget": cell.budget, "control": cell.control}
    bounds = {"mean": value.mean, "low": value.low, "high": value.high}
    beside = estimate.model_dump(mode="json", exclude={"cell", "value", "lost"})
    return {name: getattr(cell, name) for name in AXES} | views | bounds | beside


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("name", ["acceptance", "speedup", "headline", "families", "controls"])
def test_every_estimate_of_a_committed_summary_is_as_it_was_written(study: str, name: str) -> None:
    raw, summary = summary_of(study)
    estimates = getattr(summary, name)
    assert estimates and len(estimates) == len(raw[name])
    for found, written in zip(estimates, raw[name], strict=True):
        lost = written.pop("lost", None)
        assert flat(found) == written
        assert lost is None or list(astuple(found.lost)) == lost


def test_a_committed_summary_has_what_gains_lose_under_the_control() -> None:
    _, summary = summary_of("paper-small")
    assert all((gain.lost is not None) == bool(gain.cell.control) for gain in summary.headline)


@pytest.mark.parametrize("study", STUDIES)
def test_speeds_and_advice_of_a_committed_summary_are_as_they_were_written(study: str) -> None:
    raw, summary = summary_of(study)
    speeds = [(s.dataset, s.context, s.temperature, *astuple(s.speed)) for s in summary.ar_tokens_per_s]
    names = ("dataset", "context", "temperature", "mean", "low", "high")
    assert speeds and speeds == [tuple(s[name] for name in names) for s in raw["ar_tokens_per_s"]]
    advised = 0
    for found, written in zip(summary.recommendations, raw["recommendations"], strict=True):
        assert (found.why, found.best_again) == (written["why"], written["best_again"])
        for choice, was in (
            (found.choice, written["choice"]),
            (found.runner_up, written["runner_up"]),
        ):
            assert (choice is None) == (was is None)
            if choice is None:
                continue
            advised += 1
            assert [getattr(choice.cell, name) for name in AXES] == [was[name] for name in AXES]
            assert astuple(choice.speedup) == (was["speedup"], was["speedup_low"], was["speedup_high"])
            again = (None, None, None) if choice.again is None else astuple(choice.again)
            assert again == (was["again"], was["again_low"], was["again_high"])
            assert (choice.run_off, choice.end_to_end) == (was["run_off"], was["end_to_end"])
    assert advised


def test_scores_of_another_clock_are_left_out() -> None:
    """The older study's, from before errors were counted in autoregressive steps timed beside them."""
    raw, summary = summary_of("paper-small")
    assert [score.model_dump() for score in summary.prediction] == raw["prediction"] != []
    raw, summary = summary_of("paper-small-800")
    assert raw["prediction"] and not any("pace" in score for score in raw["prediction"])
    assert summary.prediction == ()


def test_a_summary_is_read_back_as_it_was() -> None:
    _, summary = summary_of("paper-small")
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
