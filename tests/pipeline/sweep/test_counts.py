"""What a sweep comes to, by hand and against the choice of cells itself."""

from __future__ import annotations

import random

import pytest

from pipeline.axes import Place
from pipeline.intervals import Interval
from pipeline.store.rows import PredictedRow
from pipeline.sweep import picks
from pipeline.sweep.counts import count_sweep
from pipeline.sweep.grid import cells_behind, draft_sources, views_of
from pipeline.sweep.picks import configured_picks, most_timed
from tests.helpers.configs import MINIMAL, config_with


def test_rows_by_hand() -> None:
    """2 data sets of 3 and 5 prompts, 2 drafters, budgets 16, 32 and full, and a plane in one of them."""
    sources = [{**MINIMAL["data"]["sources"][0], "name": name} for name in ("tales", "more")]
    plane = {"drafter": "full_only", "dataset": "tales", "context": "64"}
    timed = {"drafters": ["multi_view"], "budgets": [16], "prompts": 2, "repeats": 5}
    sweep = {"mode": "both", "gammas": [2, 4, 8], "temperatures": [0.0, 0.7], "seeds": [0, 1, 2]}
    config = config_with(data={"sources": sources}, sweep=sweep | {"measure": timed | {"plane": plane}})
    counts = count_sweep(config, {Place("tales", "64"): 3, Place("more", "64"): 5})
    texts = 1 + 3  # greedy, and each seed of sampling
    assert counts.cells == 2 * 2 * (3 + 3 + 1) * 3 * texts  # what is measured is among them
    assert counts.replayed == (3 + 5) * 2 * (3 + 3 + 1) * 3 * texts  # views, another prompt's, and none
    # The three best and what is not named of a plane's corners: two of multi_view's, four of full_only's.
    assert counts.measured == 2 * (1 * 3 + 3 * 3 + 3 + 2) * texts + 2 * (1 * 3 + 3 + 4) * texts
    assert counts.rechecked == 2 * 2 * (3 + 3)  # greedily
    plain = 2 * (2 + 2)  # autoregressive, by place and drafter, all three times
    more = 4  # times the repeats, in the run-off and behind it
    assert counts.runs == 5 * (counts.measured + plain * texts + more * (counts.rechecked + 2 * plain))

    unpredicted = sweep | {"temperatures": [0.0], "measure": {**timed, "predict": False}}
    config = config_with(data={"sources": sources}, sweep=unpredicted)
    counts = count_sweep(config, {Place("tales", "64"): 3, Place("more", "64"): 1})
    assert counts[2:] == ((2 + 1) * 3, 0, 5 * (2 + 1) * (3 + 1))
    config = config_with(data={"sources": sources}, sweep=unpredicted | {"mode": "measure"})
    counts = count_sweep(config, {Place("tales", "64"): 3, Place("more", "64"): 1})
    assert counts[:3] == (2 * 3, 0, (2 + 1) * 3)


@pytest.mark.parametrize(("gammas", "reached"), [([1, 2, 4, 8], True), ([2], False)])
def test_no_predictions_point_at_more(gammas: list[int], reached: bool) -> None:
    """Against the choice itself, of speeds at random; where cells are many, some draws reach the bound."""
    place, named = Place("code", "64"), {"drafters": ["multi_view"], "budgets": [16], "gammas": gammas[-1:]}
    config = config_with(
        sweep={
            "mode": "both",
            "gammas": gammas,
            "policies": ["chunk_topk", "streaming"],
            "baselines": ["self_speculation", "prompt_lookup"],
            "measure": named,
        }
    )
    sources = draft_sources(config)
    here = set(configured_picks(config.sweep, sources, place))
    added = most_timed(config, place) - here
    cells, others = len(added), {cell.drafter for cell in added} - {cell.drafter for cell in here}
    draw, most, most_others = random.Random(0), 0, 0
    for _ in range(300):
        rows = [
            PredictedRow(
                cell=cell, num_prompts=1, num_documents=1, decode_s=1, speedup=Interval(draw.random(), 0, 1)
            )
            for source in sources
            for view in views_of(config.sweep, source)
            if not view.control
            for cell in cells_behind(config.sweep, source, place, view)
        ]
        fastest = picks.by_place(rows)[place]
        names = picks.first_seeds([source.name for source in sources])
        added = set(picks.worth_measuring([row.cell for row in fastest], names)) - here
        most = max(most, len(added))
        most_others = max(most_others, len({p.drafter for p in added} - {p.drafter for p in here}))
    assert most <= cells and most_others == len(others) == 1
    assert (most == cells) or not reached


def test_predictions_point_at_no_cascade() -> None:
    """The cells that they may add are those of the other sources."""
    sweep = {
        "mode": "both", "baselines": ["self_speculation", "cascade"], "drafters": ["full_only"],
        "cascade": {"drafter": "multi_view", "budget": 24, "gamma": 3},
        "measure": {"drafters": ["full_only"], "budgets": ["full"], "gammas": [2]},
    }  # fmt: skip
    drafting = {cell.drafter for cell in most_timed(config_with(sweep=sweep), Place("code", "64"))}
    assert drafting == {"full_only", "self_speculation"}
