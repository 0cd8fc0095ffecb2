"""The study of windows: who is at home where, what is judged, and the page of a finished toy run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import runs
from benchmarks.windows_study import __main__ as windows_study
from benchmarks.windows_study import checks
from benchmarks.windows_study.checks import Grid, homes
from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import dump_config, load_config
from pipeline.config.schema import Config
from pipeline.intervals import Interval
from pipeline.results.summary import Summary
from pipeline.store.rows import PromptRow
from tests.helpers.paths import ROOT
from tests.helpers.study_rows import EMPTY, make_row, measured, varied
from tests.helpers.study_rows import replayed as replayed_cell
from tests.helpers.toys import toy_config
from tests.jobs.stages.test_heads import headed

WINDOWS = ROOT / "conf/smollm2/windows.yaml"
LAYERS = ROOT / "conf/smollm2/windows-layers.yaml"


def toy_windows(corpus: Path, storage: Path, **changes: Any) -> Config:
    """Heads over a toy target, of all variants that the study compares."""

    def change(values: dict[str, Any]) -> None:
        headed(values)
        sparse = {"full_weight": 0, "sparse_weight": 1, "num_views": 1, "policy": "window"}
        values["train"]["variants"] = [
            {"name": "full_only", "sparse_weight": 0},
            {"name": "single_16", "budgets": {16: 1}, **sparse},
            {"name": "multi_view", "policy": "window", "budgets": {16: 0.5, 32: 0.5}},
        ]
        values["sweep"] |= {
            "mode": "replay", "policies": ["window"], "budgets": [16, 32, "full"], "temperatures": [0.0],
            "baselines": [], "controls": ["other_prompt"],
        }  # fmt: skip
        values["sweep"]["measure"] |= {"budgets": [16]}
        values |= changes

    return toy_config(corpus, storage, change)


def rows_of_families(accepted: dict[tuple[str, Any], int], documents: int = 20) -> list[PromptRow]:
    """Of every drafter behind every window, one prompt a document: so many of 100 proposals accepted."""
    return [
        varied(
            make_row(f"p{number}", rate, 100, f"d{number}"),
            drafter=name, budget=budget, policy="full" if budget == "full" else "window",
            reached=(20, 10, 5, 2), kept=(rate // 10, 5, 2, 1),
        )
        for (name, budget), rate in accepted.items()
        for number in range(documents)
    ]  # fmt: skip


def grid_of(config: Config, rows: list[PromptRow], **parts: Any) -> Grid:
    return Grid.of(replace(EMPTY, config=config, rows=rows, **parts))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    config = toy_windows(corpus, tmp_path / "runs")
    return config.model_copy(
        update={"sweep": config.sweep.model_copy(update={"gammas": (4,), "controls": ()})}
    )


ACCEPTED = {
    ("full_only", "full"): 60, ("full_only", 16): 20, ("full_only", 32): 30,
    ("single_16", "full"): 30, ("single_16", 16): 50, ("single_16", 32): 49,
    ("multi_view", "full"): 59, ("multi_view", 16): 47, ("multi_view", 32): 50,
}  # fmt: skip


def test_a_specialist_is_at_home_where_it_was_trained(config: Config) -> None:
    assert homes(config) == {"full_only": "full", "single_16": 16}
    for file, there in (
        (WINDOWS, {"full_only": "full", "single_64": 64, "single_256": 256}),
        (LAYERS, {"full_only": "full"}),
    ):
        study = load_config(file)
        assert homes(study) == there, file
        assert set(there.values()) <= set(study.sweep.budgets)


def test_ours_may_lose_two_points_at_home_and_specialists_more_elsewhere(config: Config) -> None:
    grid = grid_of(config, rows_of_families(ACCEPTED))
    full, narrow = checks.at_home(grid)
    assert (round(full.value or 0, 9), full.met) == (-0.01, True), full
    assert (round(narrow.value or 0, 9), narrow.met) == (-0.03, False), narrow
    assert "single_16 at home (B = 16)" in narrow.row and "full_only at home (the full cache)" in full.row
    lost, other = checks.away_from_home(grid)
    assert (round(lost.value or 0, 9), lost.met) == (-0.27, True) and "behind B = 16" in lost.note
    assert (round(other.value or 0, 9), other.met) == (-0.29, True) and "behind the full cache" in other.note
    level = rows_of_families(ACCEPTED | {("single_16", "full"): 58, ("single_16", 32): 49})
    _, kept = checks.away_from_home(grid_of(config, level))
    assert kept.met is False, "a specialist that loses a point away from home is no reason for several views"


def test_few_documents_are_no_verdict(config: Config) -> None:
    grid = grid_of(config, rows_of_families(ACCEPTED, documents=5))
    assert {check.met for check in (*checks.at_home(grid), *checks.away_from_home(grid))} == {None}


def test_heads_and_layers_are_compared_by_first_proposals_and_end_to_end(config: Config) -> None:
    heads = grid_of(config, rows_of_families(ACCEPTED))
    layers = grid_of(config, rows_of_families(ACCEPTED | {("multi_view", "full"): 30}))
    (first,) = checks.against_layers(heads, layers)
    assert first.value == pytest.approx(5 / 20 - 3 / 20) and first.met, "5 and 3 of 20 rounds"
    fast, slow = (
        replace(EMPTY, cells=[varied(measured("multi_view", 1.5), end_to_end=Interval(end, end, end))])
        for end in (1.2, 1.1)
    )
    _, ends = checks.against_layers(replace(heads, run=replace(heads.run, cells=fast.cells)),
                                    replace(layers, run=replace(layers.run, cells=slow.cells)))  # fmt: skip
    assert ends.value == pytest.approx(1.2 / 1.1) and ends.met


def test_what_was_not_timed_is_not_decided() -> None:
    (none,) = checks.faster(replace(EMPTY, cells=[replayed_cell("multi_view")]))
    assert none.met is None and "nothing was timed" in none.note
    cells = [
        measured("multi_view", 1.4),
        measured("multi_view", 1.6, gamma=6),
        measured("prompt_lookup", 9.0),
    ]
    (best,) = checks.faster(replace(EMPTY, cells=cells))
    assert (best.value, best.met) == (1.6, True)


@pytest.mark.slow
def test_the_page_of_a_finished_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy_windows(corpus, tmp_path / "runs")
    file, output = tmp_path / "toy.yaml", tmp_path / "page"
    file.write_text(dump_config(config))
    run_pipeline(config)
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: None)
    windows_study.main([str(file), "--storage", str(tmp_path / "runs"), "--output", str(output)])
    written = Summary.model_validate_json((output / "summary.json").read_text())
    at_home = [check for check in written.checks if "at home" in check.row]
    assert len(at_home) == 2 and all(check.value is not None for check in at_home)
    page = (output / "README.md").read_text()
    for heading in ("Specialists against `multi_view`", "First proposals", "Use of the context", "Training"):
        assert f"## {heading}\n" in page
    # A table's figure from the rows themselves.
    shares = {
        (row.cell.drafter, row.cell.budget): row.value.mean
        for row in written.acceptance
        if not row.cell.control
    }
    home = next(check for check in at_home if "full_only" in check.row)
    assert home.value == pytest.approx(shares["multi_view", "full"] - shares["full_only", "full"], abs=2e-6)
