"""The bench that each file of the sweep's tests works on, and what its whole replay gave."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedModel

from pipeline.store.files import read_rows
from pipeline.store.rows import PromptRow
from tests.helpers.sweeps import SweepBench


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    make_model: Any,
) -> SweepBench:
    models = {"target": target, "drafter": drafter, "poor": make_model(layers=1, seed=9)}
    return SweepBench(tmp_path_factory.mktemp("evaluate"), models)


@pytest.fixture(scope="module")
def replayed(bench: SweepBench) -> list[PromptRow]:
    task = bench.replay_task(bench.folder / "replayed")
    assert bench.evaluator()(task).failed == 0
    return read_rows(task.output, PromptRow)
