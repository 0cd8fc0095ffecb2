"""Cells of a lossy rule beside exact ones: pooled by hand, named in a finding, and in nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.gate import GateConfig
from pipeline.gate.pairs import compared
from pipeline.metrics import Departure
from pipeline.report.figures import draw_all
from pipeline.results.brief import why
from pipeline.results.findings import summarise
from pipeline.results.points import axes, point_key, point_metrics, point_name
from pipeline.results.pool import cell_rows, replayed_or_measured
from pipeline.results.recommend import choices, recommend, settings_text
from pipeline.serving.flags import lacks
from pipeline.store.rows import PromptRow
from tests.helpers.report import AXES, measured, row, sweep_rows
from tests.helpers.rows import varied

MARK = "dropmatch (lossy: the text is not the target's own)"


def lossy(prompt: int, **changes: Any) -> PromptRow:
    """Twice as fast as AR, looping, and everything accepted; 12 tokens of which 3 differ from AR's."""
    values = {
        "rule": "dropmatch", "exact": None, "accepted": 10, "looping": True, "decode_s": [1.0, 1.0],
        "departure": Departure(12, 9, 4 + prompt, 12, 2, -18.0, 12, -12.0),
    }  # fmt: skip
    return measured("multi_view", prompt, **{**values, **changes})


EXACT = [*sweep_rows(), *(measured("multi_view", n, decode_s=[2.0, 2.0], gamma=2) for n in range(12))]
BOTH = [*EXACT, *(lossy(n, gamma=gamma) for gamma in (2, 4) for n in range(12))]
CELLS = {name: cell_rows(rows, AXES, 100, 0) for name, rows in (("exact", EXACT), ("both", BOTH))}


def test_lossy_cells_are_pooled_and_come_behind_the_exact_one() -> None:
    pooled = [cell for cell in CELLS["both"] if cell.cell.lossy]
    assert len(pooled) == 2 and [cell for cell in CELLS["both"] if not cell.cell.lossy] == CELLS["exact"]
    for cell in pooled:
        assert cell.departure == Departure(144, 108, 4, 144, 24, -216.0, 144, -144.0)
        assert (cell.exact_prompts, cell.num_left_out) == (None, 0)
        assert cell.speed is not None and cell.speed.speedup.mean == pytest.approx(3.0)
    order = [cell.cell for cell in CELLS["both"] if cell.mode == "measure"]
    assert order.index(pooled[1].cell) == order.index(pooled[1].cell.vary(rule="exact")) + 1


def test_the_summary_is_that_without_them_but_for_one_finding() -> None:
    """Acceptance, gains, controls, speedups, recommendations and every other sentence."""
    without, beside = (
        summarise(rows, CELLS[name], [], AXES, 100, 0) for name, rows in (("exact", EXACT), ("both", BOTH))
    )
    said = [text for text in beside.findings if text not in without.findings]
    (finding,) = [text for text in said if "lossy" in text]
    assert finding == (
        "2 measured cells accept by dropmatch, which is lossy: the text is not the target's own. In them "
        "75.0 % of positions hold what autoregressive decoding has there, 16.7 % of tokens are not the "
        "target's arg-max; the target's mean log-likelihood a token is -1.500, and of its own text -1.000. "
        "They are in a table of their own, and in no other sentence, figure or recommendation here."
    )
    # The count of cells with few documents is of all cells.
    assert all("documents: intervals are too narrow" in text for text in said if text != finding)
    same = {"findings", "ar_tokens_per_s"}
    assert without.model_dump(exclude=same) == beside.model_dump(exclude=same)
    assert without.recommendations and not any("dropmatch" in str(one) for one in beside.recommendations)
    assert why(without, CELLS["exact"]) == why(beside, CELLS["both"])


def test_they_are_choices_only_where_they_are_asked_for_and_then_alone() -> None:
    (place,) = choices(CELLS["both"], [], [])
    plain = choices(CELLS["both"], [], [])[place]
    assert plain == choices(CELLS["exact"], [], [])[place] and not any(one.cell.lossy for one in plain)
    asked = choices(CELLS["both"], [], [], lossy=True)[place]
    assert len(asked) == 2 and all(one.cell.lossy for one in asked)
    advice = recommend(place, asked, 5)
    assert advice.choice is not None and advice.choice.departure is not None
    assert settings_text(advice.choice.cell).endswith(f", {MARK}")
    assert "by its first measurement alone" in advice.why
    assert choices(CELLS["exact"], [], [], lossy=True) == {}


def test_they_are_no_evidence_for_a_gate_and_no_engine_serves_them() -> None:
    assert not any(cell.lossy for cell in replayed_or_measured(BOTH))
    cell = lossy(0).cell
    config = GateConfig(gammas=(4,))
    assert compared(cell.vary(rule="exact"), config) and not compared(cell, config)
    full = cell.vary(budget="full", policy="full")
    assert lacks("vllm", full.vary(rule="exact")) == ""
    assert lacks("vllm", full) == "vLLM does not accept by dropmatch"


def test_no_figure_shows_them(tmp_path: Path) -> None:
    drawn: list[dict[str, bytes]] = []
    for name, rows in (("exact", EXACT), ("both", BOTH)):
        summary = summarise(rows, CELLS[name], [], AXES, 100, 0)
        draw_all(CELLS[name], summary.acceptance, AXES, tmp_path / name)
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert drawn[0] and drawn[0] == drawn[1]


def test_their_points_are_marked() -> None:
    (cell,) = (one for one in CELLS["both"] if one.cell.lossy and one.cell.gamma == 4)
    exact = cell.cell.vary(rule="exact")
    assert axes(cell.cell) == axes(exact) | {"rule": "dropmatch"} and point_key(cell.cell) != point_key(exact)
    assert point_name(cell.cell) == f"{point_name(exact)}|dropmatch"
    values = {name: value for name, value, _ in point_metrics([cell])}
    assert values["quality/same_as_ar_share"] == 0.75
    assert values["quality/not_best_share"] == pytest.approx(1 / 6)
    assert (values["quality/log_prob"], values["quality/ar_log_prob"]) == (-1.5, -1.0)
    assert "quality/exact_share" not in values
    plain = point_metrics(cell_rows([varied(row(), mode="replay")], AXES, 100, 0))
    assert not any(name.endswith("log_prob") for name, _, _ in plain)
