"""Cells against sums by hand."""

from dataclasses import astuple

import pytest

from pipeline.errors import BadData
from pipeline.results import pool
from pipeline.results.axes import Axes
from pipeline.store.rows import CellRow
from tests.helpers.report import AXES, config, measured, row, sweep_rows
from tests.helpers.rows import varied

SEEDED = {"samples": 200, "seed": 0}


def only(rows) -> CellRow:
    (cell,) = pool.cell_rows(rows, AXES, **SEEDED)
    return cell


def test_axes_come_from_the_config(tmp_path):
    axes = Axes.of(config(tmp_path))
    assert axes == AXES


def test_least_documents_come_from_the_config(tmp_path):
    assert Axes.of(config(tmp_path, report={"least_documents": 8})).least_documents == 8


def test_headline_gamma_is_the_swept_one_nearest_to_the_validation_curve(tmp_path):
    swept = {"mode": "replay", "budgets": [0, "full"], "gammas": [1, 6, 16]}
    axes = Axes.of(config(tmp_path, sweep=swept))
    assert (axes.gamma, axes.smallest_budget) == (6, None)


def test_replayed_cell_by_hand():
    rows = [
        row(
            prompt=0, accepted=2, proposed=10, num_tokens=9, num_rounds=5, looping=True, drafter_kv_bytes=100
        ),
        row(prompt=1, accepted=9, proposed=10, num_tokens=11, num_rounds=5, drafter_kv_bytes=300),
        row(prompt=2, accepted=30, proposed=40, num_tokens=40, num_rounds=10, in_trained_range=False),
    ]
    cell = only(rows)
    assert (cell.num_prompts, cell.num_documents, cell.num_looping) == (3, 2, 1)
    assert cell.acceptance.mean == pytest.approx(41 / 60)
    assert cell.acceptance.low < cell.acceptance.mean < cell.acceptance.high
    assert cell.acceptance_not_looping == pytest.approx(39 / 50)
    assert cell.mean_tokens_per_round == pytest.approx(60 / 20)
    assert cell.conditional_acceptance == pytest.approx([0.5, 1 / 3])
    assert cell.in_trained_range is False
    assert (cell.drafter_kv_bytes, cell.target_kv_bytes) == (2048, None)
    assert (cell.speed, cell.exact_prompts, cell.peak_memory_bytes) == (None, None, None)


def test_measured_cell_by_hand():
    rows = [
        measured(prompt=0),
        measured(
            prompt=1,
            num_tokens=24,
            ar_num_tokens=24,
            decode_s=[3.0, 5.0],
            ar_decode_s=[6.0, 6.0],
            exact=False,
        ),
    ]
    cell = only(rows)
    # 36 tokens in 2 + 4 s of decoding, against 3 + 6 s; prefills add 3 s and 2 s.
    assert cell.speed.tokens_per_s == pytest.approx(36 / 6)
    assert cell.speed.ar_tokens_per_s == pytest.approx(36 / 9)
    assert cell.speed.speedup.mean == pytest.approx(9 / 6)
    assert cell.speed.end_to_end.mean == pytest.approx(11 / 9)
    # Resamples of two prompts, each with its two repeats: no ratio lies beyond the best and worst of them.
    end_to_end = cell.speed.end_to_end
    assert 1 <= end_to_end.low < 11 / 9 < end_to_end.high <= cell.speed.speedup.high
    assert cell.speed.worst_prompt_speedup == pytest.approx(1.5)
    assert (cell.exact_prompts, cell.target_kv_bytes, cell.peak_memory_bytes) == (1, 65536, 10**6)


def test_prompts_that_all_loop_leave_no_acceptance_without_looping():
    assert only([row(looping=True)]).acceptance_not_looping is None


def test_cell_that_proposed_nothing_is_left_out():
    empty = row(accepted=0, proposed=0, num_rounds=0, reached=(0,) * 4, kept=(0,) * 4)
    assert pool.cell_rows([empty], AXES, **SEEDED) == []


def test_cell_whose_proposals_are_unknown_has_no_acceptance():
    """Replay with a threshold: accepted tokens and rounds are known, refused proposals are not."""
    unknown = row(accepted=6, proposed=None, threshold=0.4)
    cell = only([unknown, row(prompt=1, accepted=6, proposed=12, threshold=0.4)])
    assert (cell.acceptance, cell.acceptance_not_looping) == (None, None)
    assert cell.mean_tokens_per_round == pytest.approx(24 / 12)
    assert pool.acceptances([cell]) == []
    decoded = measured(accepted=6, proposed=9, threshold=0.4)
    assert pool.replay_check([unknown, decoded]).equal == 1
    assert pool.replay_check([unknown, varied(decoded, num_accepted=5)]).equal == 0


def test_prompt_twice_in_a_cell_is_refused():
    with pytest.raises(BadData, match=r"'p0' twice .*full_only"):
        pool.cell_rows([row(), row()], AXES, **SEEDED)


@pytest.mark.parametrize(
    "broken", [{"decode_s": [1.0]}, {"decode_s": [], "ar_decode_s": []}, {"ar_num_tokens": 0}]
)
def test_measured_prompt_without_its_times_is_refused(broken):
    with pytest.raises(BadData, match="'p1'"):
        pool.cell_rows([measured(prompt=1, **broken)], AXES, **SEEDED)
    with pytest.raises(BadData, match="'p1'"):
        pool.cell_rows([measured(prompt=0), measured(prompt=1, **broken)], AXES, **SEEDED)


def test_cells_come_in_the_order_of_the_config():
    cells = pool.cell_rows(sweep_rows(), AXES, **SEEDED)
    shown = [
        (c.cell.drafter, c.cell.control, c.cell.budget, c.cell.gamma) for c in cells if c.mode == "replay"
    ]
    assert shown[:4] == [
        ("full_only", None, 16, 2), ("full_only", None, 16, 4),
        ("full_only", None, "full", 2), ("full_only", None, "full", 4),
    ]  # fmt: skip
    assert [drafter for drafter, *_ in shown] == ["full_only"] * 8 + ["multi_view"] * 8


def test_acceptance_prefers_the_replay_and_speedup_takes_measured_cells():
    cells = pool.cell_rows(sweep_rows(), AXES, **SEEDED)
    acceptance = pool.acceptances(cells)
    assert len(acceptance) == 16
    assert {(e.num_prompts, e.num_documents) for e in acceptance} == {(12, 6)}
    speedup = pool.speedups(cells)
    assert len(speedup) == 4
    assert {(e.num_prompts, e.num_documents) for e in speedup} == {(2, 1)}
    assert all(e.value.mean == pytest.approx(1.5) for e in speedup)


def test_acceptance_interval_resamples_documents():
    """Two documents, each of one easy and one hard prompt: every resample has the same rate."""
    rows = [row(prompt=p, accepted=9 if p % 2 else 1, proposed=10) for p in range(4)]
    alike = only(rows)
    assert astuple(alike.acceptance) == pytest.approx((0.5, 0.5, 0.5))
    # The same prompts, the easy ones in one document: a resample has both documents, or one of them twice.
    apart = only([r.model_copy(update={"document_id": f"d{p % 2}"}) for p, r in enumerate(rows)])
    assert (apart.acceptance.low, apart.acceptance.high) == pytest.approx((0.1, 0.9))


def test_lossless_counts_prompts_that_are_exact_in_every_cell():
    rows = [
        measured(prompt=0, gamma=2), measured(prompt=0, gamma=4), measured(prompt=1, gamma=2, exact=False),
        measured(prompt=1, gamma=4), measured(prompt=2, temperature=1.0, exact=None),
        row(prompt=3),
    ]  # fmt: skip
    found = pool.lossless(rows)
    assert (found.prompts, found.exact) == (2, 1)


def test_replay_is_checked_against_decoding():
    rows = [
        row(prompt=0),
        row(prompt=1),
        measured(prompt=0),
        measured(prompt=1, accepted=6),
        measured(prompt=9),
    ]
    found = pool.replay_check(rows)
    assert (found.rows, found.equal) == (2, 1)
    for changed in ({"num_rounds": rows[0].counts.num_rounds + 1}, {"kept": (*rows[0].counts.kept[:-1], 99)}):
        decoded = varied(measured(prompt=0), **changed)
        assert pool.replay_check([rows[0], decoded]).equal == 0, changed
