"""The same pipeline on Ray and in one process: the same labels, losses and acceptance."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jobs.stages.pipeline import run_pipeline
from pipeline.config.schema import Config
from pipeline.observe.training import read_metrics
from pipeline.store.files import read_rows
from pipeline.store.layout import METRICS
from pipeline.store.rows import Continuation, PromptRow
from tests.helpers.configs import MINIMAL


def run(storage: Path, executor: str) -> Path:
    given = copy.deepcopy(MINIMAL) | {"storage": str(storage)}
    given["run"]["executor"] = executor
    # Enough training that a fault in one path would move the losses.
    given["train"] |= {"steps": 12, "learning_rate": 3e-3, "validation_budgets": [16, "full"]}
    run_pipeline(Config.model_validate(given))
    return storage


def one(storage: Path, stage: str) -> Path:
    (folder,) = storage.glob(f"{stage}-*")
    return folder


@pytest.mark.ray
def test_ray_and_inline_give_the_same(tmp_path: Path, on_local_ray: ModuleType) -> None:
    inline, ray = run(tmp_path / "inline", "inline"), run(tmp_path / "ray", "ray")

    sequences = [sorted(one(s, "prepare").glob("sequences/*.npy")) for s in (inline, ray)]
    assert [file.read_bytes() for file in sequences[0]] == [file.read_bytes() for file in sequences[1]]

    # The target was pretrained by two different engines, so weights and logit gaps differ in the last bits;
    # arg-max labels and greedy tokens do not.
    for name in ("tokens", "argmax"):
        labels = [sorted(one(s, "teach").glob(f"labels/*.{name}.npy")) for s in (inline, ray)]
        for ours, theirs in zip(*labels, strict=True):
            np.testing.assert_array_equal(np.load(ours), np.load(theirs))
    for file in one(inline, "teach").glob("continuations/*.jsonl"):
        ours = read_rows(file, Continuation)
        theirs = read_rows(one(ray, "teach") / "continuations" / file.name, Continuation)
        assert [row.tokens for row in ours] == [row.tokens for row in theirs]

    for stage in ("pretrain-target", "pretrain-drafter", "drafter-full_only", "drafter-multi_view"):
        ours, theirs = (read_metrics(one(s, stage) / METRICS) for s in (inline, ray))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            for key in a.keys() - {"train/tokens_per_s"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), (stage, key)

    rows = []
    for storage in (inline, ray):
        files = sorted(one(storage, "sweep").glob("rows/*.jsonl"))
        rows.append([row for file in files for row in read_rows(file, PromptRow)])
    assert rows[0] == rows[1] and rows[0]

    summaries = [json.loads((one(s, "report") / "summary.json").read_text()) for s in (inline, ray)]
    assert summaries[0]["acceptance"] == summaries[1]["acceptance"]
