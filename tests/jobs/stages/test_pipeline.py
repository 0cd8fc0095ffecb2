"""All stages on a toy: what is reused, resumed, repaired and promised."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.executors.choose import NoExecutor
from jobs.records.record import RECORDS
from jobs.stages import pipeline
from jobs.stages.pipeline import run_pipeline
from pipeline.errors import Incomplete, NotFinite
from pipeline.store.files import read_rows
from pipeline.store.layout import MANIFEST
from pipeline.store.rows import CellRow, Continuation, FailedCell, PromptRow
from pipeline.sweep.replayer import PromptReplay
from tests.helpers.toys import PROMPTS, artifact, reseal, toy_config

REWRITTEN = ("summary.json", "report.html")  # by every run, as they tell about it


def changes(storage: Path) -> dict[str, int]:
    """Every file that a run may not touch again → when it was written."""
    found = (file for file in storage.rglob("*") if file.is_file() and file.name not in REWRITTEN)
    files = (file for file in found if RECORDS not in file.parts)
    return {str(file.relative_to(storage)): file.stat().st_mtime_ns for file in files}


def summary_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "stages"}


def cached(path: Path) -> dict[str, bool]:
    return {stage["name"]: stage["cached"] for stage in json.loads(path.read_text())["stages"]}


# ── what is promised ──────────────────────────────────────────────────────────────────────────────


def test_the_summary_holds_what_other_programs_read(finished: Path) -> None:
    summary = json.loads((artifact(finished, "report") / "summary.json").read_text())
    stages = ["prepare", "pretrain", "teach", "train", "sweep", "report"]
    assert [stage["name"] for stage in summary["stages"]] == stages
    assert all(set(stage) == {"name", "seconds", "cached"} for stage in summary["stages"])
    assert summary["lossless"] == {"prompts": 2, "exact": 2, "explained": 0, "left_out_tokens": 0}
    assert summary["replay_check"]["equal"] == summary["replay_check"]["rows"] == 2
    rows = summary["acceptance"]
    for row in [*rows, *summary["speedup"]]:
        assert set(row) >= {"cell", "value", "num_prompts"}
        assert set(row["cell"]) >= {"drafter", "dataset", "context", "view", "gamma", "temperature", "seed"}
        assert set(row["cell"]["view"]) >= {"policy", "budget", "control"}
        assert set(row["value"]) == {"mean", "low", "high"}
    cells = {
        (cell["drafter"], cell["view"]["budget"], cell["view"]["control"], cell["gamma"])
        for cell in (row["cell"] for row in rows)
    }
    views = [(budget, control) for budget in (16, 32, "full") for control in (None, "other_prompt")]
    assert cells == {
        (drafter, *view, gamma)
        for drafter in ("full_only", "multi_view")
        for view in [*views, (0, "no_prefix")]
        for gamma in (2, 4)
    }
    assert all(row["num_prompts"] == PROMPTS for row in rows)
    shares = [row["value"] for row in rows]
    assert all(0 <= share["low"] <= share["mean"] <= share["high"] <= 1 for share in shares)
    (speed,) = summary["speedup"]
    assert speed["value"]["mean"] > 0 and summary["ar_tokens_per_s"][0]["speed"]["mean"] > 0


def test_rows_keep_every_token_and_a_full_cache_is_not_budgeted(finished: Path) -> None:
    files = sorted((artifact(finished, "sweep") / "rows").glob("replay-*.jsonl"))
    rows = [row for file in files for row in read_rows(file, PromptRow)]
    assert len(files) == 2 and len(rows) == 2 * 7 * 2 * PROMPTS
    (continued,) = (artifact(finished, "teach") / "continuations").glob("test-*.jsonl")
    tokens = {row.prompt_id: len(row.tokens) for row in read_rows(continued, Continuation)}
    for row in rows:
        assert row.counts.num_tokens == tokens[row.prompt_id] - 1  # the prefill gives the first
        assert row.counts.num_accepted + row.counts.num_rounds >= row.counts.num_tokens
        # K and V in float32, 1 layer of 2 heads of 8, and what is kept of 64 prompt tokens.
        kept = 64 if row.cell.budget == "full" else row.cell.budget
        assert row.drafter_kv_bytes == 2 * 4 * 1 * 2 * 8 * kept


# ── what is reused ────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_finds_everything_and_asks_for_no_work(
    corpus: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
    before = changes(finished)
    numbers = summary_of(artifact(finished, "report") / "summary.json")
    summary = run_pipeline(toy_config(corpus, finished))
    assert changes(finished) == before
    assert set(cached(summary).values()) == {True}
    assert summary_of(summary) == numbers


def test_where_it_is_started_does_not_matter(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    before = changes(finished)
    root = os.path.relpath(corpus, finished.parent)
    config = toy_config(corpus, Path(finished.name), lambda v: v["data"].update(root=root))
    summary = run_pipeline(config)
    assert summary == artifact(finished, "report") / "summary.json"
    assert changes(finished) == before


def new_folders(corpus: Path, storage: Path, change: Callable[[dict[str, Any]], object]) -> list[str]:
    """The stages whose folders a run with a changed config adds."""
    before = {folder.name for folder in storage.iterdir()}
    untouched = changes(storage)
    run_pipeline(toy_config(corpus, storage, change))
    assert untouched.items() <= changes(storage).items()
    return sorted(f.name.rpartition("-")[0] for f in storage.iterdir() if f.name not in before)


def test_another_lambda_retrains_that_variant_only(corpus: Path, storage: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["train"]["variants"][1]["sparse_weight"] = 1.0

    assert new_folders(corpus, storage, change) == ["drafter-multi_view", "report", "sweep"]


def test_another_budget_in_the_sweep_trains_nothing(corpus: Path, storage: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["sweep"]["budgets"] = [16, 24, 32, "full"]

    assert new_folders(corpus, storage, change) == ["report", "sweep"]


def test_what_only_says_how_to_run_changes_nothing(corpus: Path, storage: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["name"] = "another"
        values["labels"]["num_workers"] = 3
        values["sweep"]["num_evaluators"] = 3

    assert new_folders(corpus, storage, change) == []


def test_other_threads_measure_anew_and_nothing_else(corpus: Path, storage: Path) -> None:
    """Wall clock belongs to them; a sweep that only replays is the same whatever they are."""

    def threads(values: dict[str, Any]) -> None:
        values["run"]["cpus_per_task"] = 2

    assert new_folders(corpus, storage, threads) == ["report", "sweep"]
    replayed = new_folders(corpus, storage, lambda v: v["sweep"].update(mode="replay"))
    assert replayed == ["report", "sweep"]

    def both(values: dict[str, Any]) -> None:
        threads(values)
        values["sweep"]["mode"] = "replay"

    assert new_folders(corpus, storage, both) == []


def test_the_same_work_elsewhere_gives_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without measured times: prompts, labels, continuations, drafters and replayed rows."""
    monkeypatch.chdir(tmp_path)
    summary = run_pipeline(toy_config(corpus, Path("some/runs"), lambda v: v["sweep"].update(mode="replay")))
    assert summary.is_relative_to(tmp_path / "some" / "runs")
    compared = 0
    for pattern in (
        "prepare-*/prompts/*.jsonl", "prepare-*/sequences/*.npy", "teach-*/labels/*.npy",
        "teach-*/continuations/*.jsonl", "*/model/model.safetensors", "sweep-*/rows/replay-*.jsonl",
    ):  # fmt: skip
        ours, theirs = sorted((tmp_path / "some" / "runs").glob(pattern)), sorted(finished.glob(pattern))
        assert [file.name for file in ours] == [file.name for file in theirs] != []
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.read_bytes() == other.read_bytes(), f"{mine} differs from {other}"
            compared += 1
    assert compared >= 10


# ── what is resumed and repaired ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stage", "lost", "made_with_it"),
    [
        ("teach", "labels/shard-00001.argmax.npy", ["labels/shard-00001.tokens.npy"]),
        ("sweep", "rows/replay-tales-64-00008.jsonl", []),
    ],
)
def test_of_a_half_made_stage_only_what_is_missing_is_made(
    corpus: Path, storage: Path, stage: str, lost: str, made_with_it: list[str]
) -> None:
    folder = artifact(storage, stage)
    before, content = changes(storage), (folder / lost).read_bytes()
    numbers = summary_of(artifact(storage, "report") / "summary.json")
    for name in (lost, MANIFEST):
        (folder / name).unlink()
    summary = run_pipeline(toy_config(corpus, storage))
    after = changes(storage)
    made = {f"{folder.name}/{name}" for name in (lost, MANIFEST, *made_with_it)}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == made
    assert (folder / lost).read_bytes() == content
    assert {name for name, found in cached(summary).items() if not found} == {stage}
    assert summary_of(summary) == numbers


def test_a_broken_drafter_fails_alone_and_is_tried_again(corpus: Path, storage: Path) -> None:
    numbers = summary_of(artifact(storage, "report") / "summary.json")
    for stage in ("sweep", "report"):
        shutil.rmtree(artifact(storage, stage))
    drafter = artifact(storage, "drafter-multi_view")
    weights = drafter / "model" / "model.safetensors"
    good = weights.read_bytes()
    broken = {key: torch.full_like(value, torch.nan) for key, value in load_file(weights).items()}
    save_file(broken, weights, metadata={"format": "pt"})
    reseal(drafter)

    # Twelve prompts are replayed behind seven views each, and two are measured.
    with pytest.raises(Incomplete, match=rf"^{7 * PROMPTS + 2} failures .*the same command tries them again"):
        run_pipeline(toy_config(corpus, storage))
    swept, reported = artifact(storage, "sweep"), artifact(storage, "report")
    assert not (swept / MANIFEST).exists()
    failed = [row for file in (swept / "failed").glob("*.jsonl") for row in read_rows(file, FailedCell)]
    assert {(row.cell.drafter, row.mode) for row in failed} == {
        ("multi_view", "replay"),
        ("multi_view", "measure"),
    }
    assert all("not finite" in row.error for row in failed)
    assert {c.cell.drafter for c in read_rows(reported / "cells.jsonl", CellRow)} == {"full_only"}
    partial = summary_of(reported / "summary.json")["acceptance"]
    assert partial == [row for row in numbers["acceptance"] if row["cell"]["drafter"] == "full_only"]
    page = (reported / "report.html").read_text()
    assert failed[0].prompt_id in page and "not finite" in page

    weights.write_bytes(good)
    reseal(drafter)
    rows = swept / "rows" / "replay-tales-64-00000.jsonl"
    assert len(read_rows(rows, PromptRow)) == 8 * 7 * 2
    summary = run_pipeline(toy_config(corpus, storage))
    assert summary_of(summary)["acceptance"] == numbers["acceptance"]
    assert (swept / MANIFEST).exists() and not list((swept / "failed").glob("*"))


# ── MLflow ────────────────────────────────────────────────────────────────────────────────────────


def test_mlflow_mirrors_a_run_and_what_a_rerun_adds(
    corpus: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    for stage in ("drafter-multi_view", "sweep", "report"):
        shutil.rmtree(artifact(storage, stage))
    config = toy_config(corpus, storage, lambda v: v.update(tracking={"experiment": "toy"}))
    whole = PromptReplay.rows

    def broken(self: PromptReplay, prompt: Any, *rest: Any) -> Any:
        if prompt.prompt_id.endswith("0003"):
            raise NotFinite("one prompt fails")
        return whole(self, prompt, *rest)

    with monkeypatch.context() as patch, pytest.raises(Incomplete):
        patch.setattr(PromptReplay, "rows", broken)
        run_pipeline(config)
    summary = run_pipeline(config)

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id], max_results=1000)}
    parents = {key: run.data.tags.get("mlflow.parentRunId") for key, run in runs.items()}
    second, first = (key for key, parent in parents.items() if parent is None)  # newest first
    assert [runs[key].info.status for key in (first, second)] == ["FAILED", "FINISHED"]
    assert {run.info.status for key, run in runs.items() if key != first} == {"FINISHED"}

    def below(root: str) -> dict[str, str]:
        return {runs[key].info.run_name: key for key, parent in parents.items() if parent == root}

    for root in (first, second):
        assert set(below(root)) == {"prepare", "pretrain", "teach", "train", "sweep", "report"}
    curves = below(below(first)["train"])
    assert set(curves) == {"full_only", "multi_view"}  # one of them was trained before, without MLflow
    assert not below(below(second)["train"])
    steps = [point.step for point in client.get_metric_history(curves["multi_view"], "loss/sparse")]
    assert steps == [8] and "validation/acceptance_full" in runs[curves["multi_view"]].data.metrics

    cells = read_rows(summary.parent / "cells.jsonl", CellRow)
    points = [runs[key] for key, parent in parents.items() if parent == below(second)["sweep"]]
    assert len(points) == 2 * 7  # drafters × (three budgets, each with its control, and no prefix)
    for point in points:
        wanted = {
            cell.cell.gamma: cell.acceptance.mean
            for cell in cells
            if cell.mode == "replay"
            and (cell.cell.drafter, str(cell.cell.budget), cell.cell.control or "none")
            == tuple(point.data.params[axis] for axis in ("drafter", "budget", "control"))
        }
        history = client.get_metric_history(point.info.run_id, "accept/rate")
        assert {one.step: one.value for one in history} == pytest.approx(wanted) != {}
        prompts = client.get_metric_history(point.info.run_id, "accept/prompts")
        assert {one.value for one in prompts} == {PROMPTS}
    names = {file.path for file in client.list_artifacts(below(second)["report"])}
    assert {"report.html", "summary.json", "figures"} <= names
