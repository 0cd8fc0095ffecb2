"""The one coordinate of a sweep: what varies in it, and what its view keeps."""

from __future__ import annotations

import pytest

from kernels import reference
from pipeline.axes import CHUNK, FULL, NOTHING, Cell, Place, View, budget_order

CELL = Cell("a~1", "code", "64", View("streaming", 32, "other_prompt"), gamma=4, threshold=0.5, seed=3)


def test_a_cell_varies_in_its_view_as_in_itself() -> None:
    other = CELL.vary(drafter="b~1", policy="chunk_topk", control=None, gamma=2, temperature=1.0)
    view = View("chunk_topk", 32)
    assert other == Cell("b~1", "code", "64", view, gamma=2, threshold=0.5, temperature=1.0, seed=3)
    assert (other.policy, other.budget, other.control) == ("chunk_topk", 32, None)
    assert other.place == Place("code", "64") == CELL.place
    assert CELL.vary() == CELL
    assert CELL.vary(view=view, budget=16).view == View("chunk_topk", 16)
    with pytest.raises(TypeError, match="gama"):
        CELL.vary(gama=2)


def test_a_chunk_is_the_kernels() -> None:
    assert CHUNK == reference.CHUNK


def test_every_value_but_what_the_drafter_decides_tells_cells_apart() -> None:
    changes = {
        "drafter": "b", "dataset": "x", "context": "1K", "policy": "window", "budget": 16, "control": None,
        "sinks": 4, "refresh": 8, "gamma": 2, "threshold": 0.0, "temperature": 1.0,
        "seed": 4, "rule": "dropmatch",
    }  # fmt: skip
    others = {CELL.vary(**{name: value}) for name, value in changes.items()}
    assert len(others) == len(changes) and CELL not in others
    for decided in ({"kind": "head"}, {"positions": "rebased"}):
        assert CELL.vary(**decided) == CELL and hash(CELL.vary(**decided)) == hash(CELL)


def test_the_same_entries_have_one_name() -> None:
    """Whatever the policy, "full" is all of them and 0 is none; whose they are, a control says."""
    assert View("streaming", "full").kept == View("snapkv", "full", "other_prompt").kept == FULL
    assert View("streaming", 0, "no_prefix").kept == View("chunk_topk", 0).kept == NOTHING
    assert View("streaming", 32, "other_prompt").kept == View("streaming", 32) != View("chunk_topk", 32).kept
    assert (FULL.name, View("streaming", 32).name) == ("full", "streaming/32")


def test_the_whole_cache_is_the_largest_budget() -> None:
    assert sorted([32, "full", 0, 512], key=budget_order) == [0, 32, 512, "full"]
