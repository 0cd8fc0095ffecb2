"""Rows of the policy `target_guided`: replay by the stored guide is decoding by the prefill's."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from pipeline.decode import bench as timing
from pipeline.metrics import Counts
from pipeline.results.pool import replay_check
from pipeline.store.files import read_rows
from pipeline.store.rows import PromptRow
from pipeline.sweep.evaluator import CalibrateTask
from tests.helpers.sweeps import SweepBench, key

CHANGES = {"sweep.policies": ["target_guided", "streaming"]}


@pytest.fixture(scope="module")
def guided(
    tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, drafter: PreTrainedModel
) -> SweepBench:
    """A bench whose continuations have the prompts' guides."""
    models = {"target": target, "drafter": drafter}
    return SweepBench(tmp_path_factory.mktemp("guided"), models, CHANGES)


@pytest.fixture(scope="module")
def rows(guided: SweepBench) -> list[PromptRow]:
    return guided.replayed(CHANGES)


def test_replay_is_decoding_with_the_targets_choice(guided: SweepBench, rows: list[PromptRow]) -> None:
    """Another document's entries stand at the places that the target chose of the prompt."""
    following = dict(zip((p.prompt_id for p in guided.prompts), [*guided.prompts[1:], guided.prompts[0]]))  # noqa: B905
    checked = set()
    for row in rows:
        if row.cell.policy != "target_guided" or row.cell.budget == 0:
            continue
        prompt = next(one for one in guided.prompts if one.prompt_id == row.prompt_id)
        read = following[row.prompt_id] if row.cell.control else prompt
        _, rounds = guided.speculate(prompt, read, "target_guided", row.cell.budget, row.cell.gamma)
        assert row.counts == Counts.of(rounds, row.cell.gamma), key(row)
        checked.add((row.cell.control, row.cell.budget))
    assert len(checked) == 6


def test_another_choice_is_another_result(rows: list[PromptRow]) -> None:
    found = {policy: [r.counts for r in rows if r.cell.policy == policy and r.cell.budget == 16]
             for policy in CHANGES["sweep.policies"]}  # fmt: skip
    assert found["target_guided"] != found["streaming"]


def test_measured_rows_are_exact_and_their_prefill_has_the_guides_time(
    guided: SweepBench, rows: list[PromptRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that moves only while the target ranks, by 100 s each time."""
    seconds = [0.0]

    def ranked(whole: timing.PrefixView, guiding=timing.PrefixView.guiding) -> timing.Guides:  # type: ignore[no-untyped-def]
        seconds[0] += 100
        return guiding(whole)

    monkeypatch.setattr(timing.PrefixView, "guiding", ranked)
    monkeypatch.setattr(timing, "clock", lambda device: seconds[0])
    task = guided.measured(tmp_path, changes=CHANGES)
    measured = read_rows(task.output, PromptRow)
    assert {row.cell.policy for row in measured} == {"target_guided", "streaming"}
    for row in measured:
        assert row.timing is not None and row.timing.exact
        assert (row.timing.ar_prefill_s, row.timing.prefill_s) == (0, 100)
    check = replay_check([*rows, *measured])
    assert check.rows == check.equal > 0


def test_steps_are_timed_behind_a_guide(guided: SweepBench) -> None:
    evaluator = guided.evaluator(changes={**CHANGES, "sweep.policies": ["target_guided"]})
    task = CalibrateTask("64", 64, guided.folder / "steps" / "steps.jsonl")
    times = evaluator.step_times(task, evaluator.contenders)
    assert {(time.policy, time.budget) for time in times} >= {("target_guided", 16), ("target_guided", 32)}
