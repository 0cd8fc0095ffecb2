"""The paper's numbers: as published, and set beside ours only where the configuration is the paper's."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.report import ReportInputs, report
from pipeline.config import Config
from pipeline.config_files import load_config
from pipeline.report import published
from pipeline.report.axes import Axes
from pipeline.report.published import Published, published_beside
from pipeline.report.tables import cell_rows
from pipeline.rows import CellRow, PromptRow
from tests.report.made import artifacts, config, measured, row

ROOT = Path(__file__).resolve().parents[2]
FACTS = ROOT.parent / "shared" / "paper_results.json"
PAPER = ROOT / "conf" / "paper.yaml"


# ── the numbers ───────────────────────────────────────────────────────────────────────────────────


def as_read(table: published.Table) -> dict[str, Any]:
    return {
        context: {
            str(budget): {d: [cell.speedup, cell.acceptance] for d, cell in here.items()}
            for budget, here in budgets.items()
        }
        for context, budgets in table.items()
    }


@pytest.mark.skipif(not FACTS.exists(), reason=f"the paper's results are not at {FACTS}")
def test_numbers_are_the_published_ones() -> None:
    facts = json.loads(FACTS.read_text())
    assert facts["ar_tokens_per_s"] == published.AR_TOKENS_PER_S
    assert as_read(published.BEST_GAMMA) == {c: facts["table_1_best"][c] for c in ("4K", "8K", "16K")}
    assert as_read(published.AT_GAMMA_5) == {c: facts["table_3_gamma_5"][c] for c in ("4K", "8K", "16K")}
    peaks = {c: {d: [*peak] for d, peak in here.items()} for c, here in published.PEAKS.items()}
    assert peaks == {c: facts["figure_3_peaks"][c] for c in ("4K", "8K", "16K")}
    methods = {name: [*row.values()] for name, row in published.METHODS.items()}
    assert methods == {k: v for k, v in facts["table_2_lwm_gamma_5"].items() if k != "columns"}


def test_some_numbers_by_hand() -> None:
    assert published.BEST_GAMMA["4K"][512]["lwm"] == Published(6.55, 79.37)
    assert published.BEST_GAMMA["8K"][256]["gs"] == Published(4.26, 51.76)
    assert published.AT_GAMMA_5["16K"][2048]["lwm"] == Published(1.52, 33.92)
    assert published.METHODS["BudgetDraft B=2048"] == {"8K": 2.54, "16K": 1.52}
    assert published.PEAKS["4K"]["lwm"] == (65, 6.54)


def test_the_caveat_holds() -> None:
    """The ratios that it names are those of the AR speeds, and give the figure's peaks within 2 %."""
    for dataset, ratio in {"gs": 1.566, "longbench": 1.530, "lwm": 1.519}.items():
        assert published.ar_ratio(dataset) == pytest.approx(ratio, abs=0.0005)
        assert f"{ratio:.3f} ({dataset})" in published.CAVEAT
        best = published.BEST_GAMMA["8K"][2048][dataset].speedup
        assert best / ratio == pytest.approx(published.PEAKS["8K"][dataset].speedup, rel=0.02)


# ── what stands beside them ───────────────────────────────────────────────────────────────────────

PLACE = {"drafter": "multi_view", "dataset": "pg19", "context": "8K", "budget": 256}


def paper(*overrides: str) -> Config:
    return load_config(PAPER, ["report.bootstrap_samples=100", *overrides])


def prompt_rows(**changes: Any) -> list[PromptRow]:
    """Five prompts at each γ of the paper at 8K: 40 % accepted by replay, and the fastest γ is 15.

    A measured prompt decodes in 1 s and a tenth for every step of γ away from 15, against 3 s of AR.
    """
    rows = []
    for gamma in published.GAMMAS["8K"]:
        at = {**PLACE, "gamma": gamma, **changes}
        rows += [row(prompt=p, accepted=40, proposed=100, **at) for p in range(5)]
        seconds = 1 + abs(gamma - 15) / 50
        timed = {"decode_s": [seconds] * 2, "num_accepted": 50, "num_proposed": 100}
        rows += [measured(prompt=p, **{**at, **timed}) for p in range(2)]
    return rows


def cells_of(config: Config, rows: list[PromptRow]) -> list[CellRow]:
    return cell_rows(rows, Axes.of(config), 100, 0)


def test_a_row_has_both_figures() -> None:
    config = paper()
    best, fixed = published_beside(config, cells_of(config, prompt_rows()))
    assert (best.table, best.dataset, best.context, best.budget, best.gamma) == (
        "Table 1",
        "gs",
        "8K",
        256,
        15,
    )
    assert best.published == Published(4.26, 51.76) and best.over_own_ar == pytest.approx(
        4.26 / 1.566, abs=0.001
    )
    assert (
        best.acceptance == pytest.approx(0.4) and best.num_prompts == 5
    )  # by replay, which has more prompts
    assert best.speedup == pytest.approx(3.0)
    assert (fixed.table, fixed.gamma, fixed.published) == ("Table 3", 5, Published(2.39, 74.78))
    assert fixed.over_own_ar is None and fixed.speedup == pytest.approx(3 / 1.2)


def test_table_1_needs_every_gamma_measured() -> None:
    config = paper()
    rows = [r for r in prompt_rows() if r.mode == "replay" or r.gamma == 5]
    (only,) = published_beside(config, cells_of(config, rows))
    assert only.table == "Table 3"


def test_the_names_of_sources_and_contexts_are_the_users() -> None:
    """What counts is what they are."""
    config = paper("data.sources.pg19.name=books", "data.contexts.1.name=long")
    rows = published_beside(config, cells_of(config, prompt_rows(dataset="books", context="long")))
    assert {(r.dataset, r.context) for r in rows} == {("gs", "8K")}


def test_training_seeds_do_not_matter() -> None:
    config = paper("train.variants.multi_view.seeds=[1, 2]")
    rows = published_beside(config, cells_of(config, prompt_rows(drafter="multi_view~2")))
    assert {r.drafter for r in rows} == {"multi_view~2"} and len(rows) == 2


@pytest.mark.parametrize(
    "override",
    [
        "target.path=another-org/another-model",
        "drafter.path=./llama-68m",
        "target.dtype=bfloat16",
        "data.sources.pg19.path=./pg19",
        "data.contexts.1.tokens=8000",
        "data.max_new_tokens=128",
        "train.steps=100",
        "train.variants.multi_view.sparse_weight=1",
        "train.variants.multi_view.policy=streaming",
        "train.weight_decay=0.5",
        "train.clip=100",
        "train.warmup_steps=0",
        "train.dtype=bfloat16",
        "train.learning_rate=1e-3",
        "train.min_prefix_tokens=1000",
        "labels.on_policy_fraction=0.5",
        "labels.max_sequences=50",
        "data.max_sequences=50",
    ],
)
def test_another_configuration_has_no_row(override: str) -> None:
    config = paper(override)
    assert not published_beside(config, cells_of(config, prompt_rows()))


@pytest.mark.parametrize(
    "changes",
    [
        {"drafter": "untrained"},
        {"budget": "full"},
        {"budget": 128},
        {"policy": "streaming"},
        {"control": "other_prompt"},
        {"temperature": 1.0},
    ],
)
def test_another_cell_has_no_row(changes: dict[str, Any]) -> None:
    config = paper()
    assert not published_beside(config, cells_of(config, prompt_rows(**changes)))


def test_another_wording_or_task_is_another_data_set() -> None:
    for override in ("data.sources.lwm.task=needle", "data.sources.longbench-qmsum.truncation=middle"):
        config = paper(override)
        name = override.split(".")[2]
        assert not published_beside(config, cells_of(config, prompt_rows(dataset=name)))
        assert published_beside(config, cells_of(config, prompt_rows()))  # the others stay the paper's


# ── the page ──────────────────────────────────────────────────────────────────────────────────────


def page(config: Config, storage: Path, rows: list[PromptRow]) -> str:
    made = report(config, ReportInputs(*artifacts(storage, rows, []), stages=[]))
    text = re.sub(r"<[^>]+>", " ", (made.path / "report.html").read_text(encoding="utf-8"))
    return " ".join(html.unescape(text).split())


def test_the_page_shows_them_for_the_papers_config(tmp_path: Path) -> None:
    text = page(paper(f"storage={tmp_path}"), tmp_path, prompt_rows())
    assert published.CAVEAT in text
    assert "Table 1 multi_view gs 8K 256 15 51.76 40.0 4.26× [2.72×] 3.00× 5" in text
    assert text.index("Measured speed") < text.index("numbers beside ours") < text.index("Failures")


def test_the_page_of_another_config_is_silent(tmp_path: Path) -> None:
    text = page(config(tmp_path), tmp_path, [row(prompt=p) for p in range(4)])
    assert "beside ours" not in text and "2606.00144" not in text
