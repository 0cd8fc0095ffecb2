"""The paper's numbers: as published, and set beside ours only where the configuration is the paper's."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.stages.report import ReportInputs, report
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.intervals import Interval
from pipeline.report import published
from pipeline.report.published import Published, ar_beside, published_beside
from pipeline.results.axes import Axes
from pipeline.results.pool import cell_rows
from pipeline.results.summary import ArSpeed
from pipeline.store.rows import CellRow, PredictedRow, PromptRow
from tests.helpers.paths import ROOT
from tests.helpers.report import artifacts, config, measured, row
from tests.helpers.rows import make

FACTS = ROOT.parent / "shared" / "paper_results.json"
PAPER = ROOT / "conf" / "paper.yaml"
PEAKS_8K = {"gs": 2.72, "longbench": 1.37, "lwm": 2.90}  # speedups of the paper's Figure 3


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
    assert {d: speedup for d, (_, speedup) in facts["figure_3_peaks"]["8K"].items()} == PEAKS_8K
    # What the caveat says of Table 2: its methods, and that its last row is in Table 3.
    table_2 = facts["table_2_lwm_gamma_5"]
    named = {"TriForce", "EAGLE-3", "SD sparse/full", "BudgetDraft B=2048"}
    assert table_2.keys() == {"columns", "AR"} | named
    assert table_2["BudgetDraft B=2048"] == [
        published.AT_GAMMA_5[context][2048]["lwm"].speedup for context in table_2["columns"]
    ]


def test_some_numbers_by_hand() -> None:
    assert published.BEST_GAMMA["4K"][512]["lwm"] == Published(6.55, 79.37)
    assert published.BEST_GAMMA["8K"][256]["gs"] == Published(4.26, 51.76)
    assert published.AT_GAMMA_5["16K"][2048]["lwm"] == Published(1.52, 33.92)
    assert published.AR_TOKENS_PER_S["16K"]["longbench"] == 19.67


def test_the_caveat_holds() -> None:
    """The ratios that it names are those of the AR speeds, and give the figure's peaks within 2 %."""
    for dataset, ratio in {"gs": 1.566, "longbench": 1.530, "lwm": 1.519}.items():
        assert published.ar_ratio(dataset) == pytest.approx(ratio, abs=0.0005)
        assert f"{ratio:.3f} ({dataset})" in published.CAVEAT
        best = published.BEST_GAMMA["8K"][2048][dataset].speedup
        assert best / ratio == pytest.approx(PEAKS_8K[dataset], rel=0.02)
    assert all(text in published.CAVEAT for text in ("Figure 3", "sparse/full", "TriForce", "EAGLE-3"))


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


def guess(gamma: int, speedup: float) -> PredictedRow:
    """A predicted speed in the place of `prompt_rows`."""
    return make(
        PredictedRow, policy="chunk_topk", gamma=gamma, **PLACE, num_prompts=5, num_documents=5, decode_s=1.0,
        speedup=Interval(speedup, 1, 9),
    )  # fmt: skip


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


def test_table_1_needs_every_gamma_measured_or_predicted() -> None:
    """By prediction γ = 20 is the fastest; its speed is shown where it was timed, a predicted one never."""
    config = paper()
    for timed, speedup in (({5}, None), ({5, 20}, pytest.approx(3 / 1.1))):
        rows = [r for r in prompt_rows() if r.mode == "replay" or r.cell.gamma in timed]
        cells = cells_of(config, rows)
        (only,) = published_beside(config, cells)
        assert only.table == "Table 3"
        guesses = [guess(gamma, 3 - abs(gamma - 20) / 10) for gamma in published.GAMMAS["8K"]]
        assert published_beside(config, cells, guesses[:-1]) == [only]
        best, fixed = published_beside(config, cells, guesses)
        assert fixed == only
        assert (best.table, best.gamma, best.speedup) == ("Table 1, γ by prediction", 20, speedup)
        assert best.published == Published(4.26, 51.76) and best.over_own_ar == pytest.approx(2.72, abs=0.01)
        assert best.acceptance == pytest.approx(0.4)


def test_measured_speeds_come_before_predicted_ones() -> None:
    config = paper()
    guesses = [guess(gamma, gamma) for gamma in published.GAMMAS["8K"]]
    best, _ = published_beside(config, cells_of(config, prompt_rows()), guesses)
    assert (best.table, best.gamma) == ("Table 1", 15)


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
        "sweep.measure={prompts_together: 2, predict: false}",
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


# ── autoregressive decoding beside the paper's ────────────────────────────────────────────────────


def ar_speed(dataset: str = "pg19", context: str = "8K", temperature: float = 0.0) -> ArSpeed:
    return ArSpeed(
        dataset=dataset, context=context, temperature=temperature, speed=Interval(70.0, 68.0, 72.0),
        num_prompts=9, num_documents=9,
    )  # fmt: skip


def test_ar_stands_beside_the_papers_place_by_place() -> None:
    config = paper("data.contexts=[{name: long, tokens: 16384}, {name: 8K, tokens: 8000}]")
    speeds = [ar_speed("lwm", "long"), ar_speed("pg19", "long"), ar_speed("pg19", "long", 1.0), ar_speed()]
    assert [(b.dataset, b.context, b.published) for b in ar_beside(config, speeds)] == [
        ("lwm", "16K", 19.43),
        ("gs", "16K", 19.41),
    ]
    assert ar_beside(config, speeds)[0].ours == speeds[0]


def test_ar_does_not_depend_on_the_drafter() -> None:
    config = paper("drafter.path=./another", "train.steps=10", "train.learning_rate=1e-3")
    assert ar_beside(config, [ar_speed()]) and not published_beside(config, cells_of(config, prompt_rows()))


@pytest.mark.parametrize(
    "override",
    [
        "target.path=another-org/another-model",
        "target.dtype=bfloat16",
        "data.sources.pg19.path=./pg19",
        "data.contexts.1.tokens=8000",
        "data.max_new_tokens=128",
        "sweep.measure={prompts_together: 2, predict: false}",
    ],
)
def test_ar_of_another_configuration_has_no_row(override: str) -> None:
    assert not ar_beside(paper(override), [ar_speed()])


# ── the page ──────────────────────────────────────────────────────────────────────────────────────


def page(config: Config, storage: Path, rows: list[PromptRow]) -> str:
    made = report(config, ReportInputs(*artifacts(storage, rows, []), stages=[]))
    text = re.sub(r"<[^>]+>", " ", (made.path / "report.html").read_text(encoding="utf-8"))
    return " ".join(html.unescape(text).split())


def test_the_page_shows_them_for_the_papers_config(tmp_path: Path) -> None:
    text = page(paper(f"storage={tmp_path}"), tmp_path, prompt_rows())
    assert published.CAVEAT in text
    assert "Table 1 multi_view gs 8K 256 15 51.76 40.0 4.26× [2.72×] 3.00× 5" in text
    assert "gs 8K 30.40 4.0 [4.0, 4.0] 2" in text
    assert text.index("Measured speed") < text.index("numbers beside ours") < text.index("Failures")


def test_the_page_shows_ar_where_only_that_is_the_papers(tmp_path: Path) -> None:
    text = page(paper(f"storage={tmp_path}", "train.steps=10"), tmp_path, prompt_rows())
    assert "gs 8K 30.40 4.0 [4.0, 4.0] 2" in text and published.CAVEAT in text and "Table 3 multi" not in text


def test_the_page_of_another_config_is_silent(tmp_path: Path) -> None:
    text = page(config(tmp_path), tmp_path, [row(prompt=p) for p in range(4)])
    assert "beside ours" not in text and "2606.00144" not in text
