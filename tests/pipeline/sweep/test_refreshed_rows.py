"""Rows of `sweep.refresh`: replayed by what stage teach stored, decoded, and counted with what is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import PreTrainedModel

from pipeline.errors import BadData
from pipeline.results.pool import replay_check
from pipeline.store.files import read_rows
from pipeline.store.rows import PromptRow
from pipeline.sweep.grid import Drafter, views_of
from tests.helpers.sweeps import LENGTH, SweepBench, key
from tests.helpers.tiny import tiny_config

CHANGES: dict[str, Any] = {"sweep.policies": ["target_guided", "streaming"], "sweep.refresh": 1}


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, drafter: PreTrainedModel
) -> SweepBench:
    models = {"target": target, "drafter": drafter}
    return SweepBench(tmp_path_factory.mktemp("refreshed"), models, CHANGES)


@pytest.fixture(scope="module")
def rows(bench: SweepBench) -> list[PromptRow]:
    return bench.replayed(CHANGES)


def test_only_sparse_guided_views_are_chosen_again() -> None:
    views = views_of(tiny_config(CHANGES).sweep, Drafter("drafter", None, 0))
    again = {(view.policy, view.budget) for view in views if view.refresh}
    assert again == {("target_guided", budget) for budget in tiny_config().sweep.budgets if budget != "full"}
    assert {view.refresh for view in views} == {None, 1}


def test_stored_shares_have_a_row_for_each_token_that_is_read(bench: SweepBench) -> None:
    for prompt, continuation in zip(bench.prompts, bench.continuations, strict=True):
        stored = np.load(bench.teach / "shares" / f"{prompt.prompt_id}.npy")
        assert stored.shape == (len(continuation.tokens) - 1, LENGTH // 8) and stored.dtype == np.float32
        assert (stored.sum(1) < 1).all() and (stored > 0).all()


def test_replay_is_decoding_and_what_is_held_counts(
    bench: SweepBench, rows: list[PromptRow], tmp_path: Path
) -> None:
    task = bench.measured(tmp_path, changes=CHANGES)
    measured = read_rows(task.output, PromptRow)
    assert all(row.timing is not None and row.timing.exact for row in measured)
    again = [row for row in measured if row.cell.view.refresh]
    assert again and {row.cell.policy for row in again} == {"target_guided"}
    check = replay_check([*rows, *measured])
    assert check.rows == check.equal == len(measured)
    full = next(row.drafter_kv_bytes for row in rows if row.cell.budget == "full")
    for row in [*rows, *again]:
        if row.cell.view.refresh and row.cell.budget == 16:
            assert row.drafter_kv_bytes == full + full * 16 // LENGTH


def test_choosing_again_is_another_result_for_the_control_too(
    bench: SweepBench, rows: list[PromptRow], tmp_path: Path
) -> None:
    task = bench.replay_task(tmp_path)
    once = {"sweep.policies": ["target_guided", "streaming"]}
    assert bench.evaluator(changes=once)(task).failed == 0
    counts = {key(row): row.counts for row in read_rows(task.output, PromptRow)}
    for control in (None, "other_prompt"):
        ours = [row for row in rows if row.cell.view.refresh and row.cell.control == control]
        assert ours and any(row.counts != counts[row.prompt_id, row.cell.vary(refresh=None)] for row in ours)
    others = [row for row in rows if not row.cell.view.refresh]
    assert all(row.counts == counts[key(row)] for row in others)


def test_what_is_missing_is_named(bench: SweepBench, tmp_path: Path) -> None:
    bench_task = bench.replay_task(tmp_path)
    file = bench.teach / "shares" / f"{bench.prompts[0].prompt_id}.npy"
    kept = file.rename(tmp_path / "kept.npy")
    try:
        with pytest.raises(BadData, match=r"test-0.npy is missing, which sweep.refresh asks for"):
            bench.evaluator(changes=CHANGES)(bench_task)
    finally:
        kept.rename(file)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sweep.policies": ["streaming"]}, "goes with the policy target_guided: add it"),
        ({"sweep.temperatures": [0.0, 1.0]}, "is for greedy cells"),
        ({"sweep.mode": "both", "sweep.measure": {"predict": True}}, "predicts from single steps"),
    ],
)
def test_what_could_not_be_followed_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        tiny_config({**CHANGES, **changes})
