"""A whole toy pipeline whose drafters learn from paths that they sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.stages.pipeline import run_pipeline
from pipeline.observe.training import read_metrics
from tests.helpers.toys import toy_config

KINDS: dict[str, dict[str, Any]] = {
    "first_layers": {"kind": "first_layers", "layers": [1]},
    "head": {"kind": "head", "feature_layers": [1, 1, 1]},
}


@pytest.mark.parametrize("kind", ["first_layers", pytest.param("head", marks=pytest.mark.slow)])
def test_from_the_target_to_the_report(corpus: Path, storage: Path, kind: str) -> None:
    """A variant with the term is another drafter, with a line of its own beside the one without."""

    def change(values: dict[str, Any]) -> None:
        values["drafter"] = KINDS[kind]
        plain = values["train"]["variants"][1]
        values["train"]["variants"] = [plain, plain | {"name": "paths", "path": {"every": 2, "length": 3}}]
        values["train"]["chain_steps"] = 2 if kind == "head" else None

    summary = json.loads(run_pipeline(toy_config(corpus, storage, change)).read_text())
    assert summary["lossless"]["exact"] == summary["lossless"]["prompts"] == 2
    folders = sorted(storage.glob("drafter-paths-*"), key=lambda path: path.stat().st_mtime_ns)
    rows = [row for row in read_metrics(folders[-1] / "metrics.jsonl") if "loss/path" in row]
    assert rows and all(row["loss/path"] > 0 for row in rows)
    named = {row["cell"]["drafter"] for row in summary["acceptance"]}
    assert {"multi_view", "paths"} <= named
