"""KV policies against definitions written out by hand, entry by entry."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from pipeline.kv.policies import POLICIES, select


def chunk_topk_by_hand(keys_SD: torch.Tensor, budget: int) -> list[int]:
    """One head, in plain Python."""
    S = keys_SD.shape[0]
    chunks = [list(range(at, at + 8)) for at in range(0, S - S % 8, 8)]
    tail = list(range(S - S % 8, S))
    room = (budget - len(tail)) // 8
    scores = [float(keys_SD[-1] @ keys_SD[chunk].mean(0)) for chunk in chunks]
    others = sorted(range(1, len(chunks)), key=lambda c: (-scores[c], c))[: room - 1]
    return [i for c in [0, *sorted(others)] for i in chunks[c]] + tail


@pytest.mark.parametrize("length", [64, 67, 71, 200])
@pytest.mark.parametrize("budget", [16, 24, 48])
def test_chunk_topk_is_the_written_rule(length: int, budget: int) -> None:
    keys = torch.randn(2, 3, length, 8, generator=torch.Generator().manual_seed(length))
    kept = select("chunk_topk", keys, keys.unsqueeze(2), budget)
    assert kept.shape[-1] <= budget
    for b in range(2):
        for h in range(3):
            assert kept[b, h].tolist() == chunk_topk_by_hand(keys[b, h], budget)


def test_chunk_topk_ties_go_to_the_lower_index() -> None:
    keys = torch.ones(1, 1, 64, 4)
    assert select("chunk_topk", keys, keys.unsqueeze(2), 24)[0, 0].tolist() == list(range(24))


def test_paper_chunking_drops_the_tail_and_ours_keeps_it() -> None:
    keys = torch.randn(1, 1, 69, 4, generator=torch.Generator().manual_seed(0))
    ours = set(select("chunk_topk", keys, keys.unsqueeze(2), 32)[0, 0].tolist())
    paper = set(select("chunk_topk_paper", keys, keys.unsqueeze(2), 32)[0, 0].tolist())
    assert set(range(64, 69)) <= ours and not set(range(64, 69)) & paper
    assert len(paper) == 32 and len(ours) == 24 + 5


def test_streaming_keeps_sinks_and_the_most_recent() -> None:
    keys = torch.randn(1, 2, 100, 4)
    assert select("streaming", keys, keys.unsqueeze(2), 16)[0, 1].tolist() == [0, 1, 2, 3, *range(88, 100)]


def test_snapkv_keeps_the_window_and_what_it_attends_to() -> None:
    """One far position is made to draw all attention of the last queries."""
    keys = torch.zeros(1, 1, 100, 4)
    keys[0, 0, 37] = 30.0
    queries = torch.ones(1, 1, 2, 16, 4)
    kept = select("snapkv", keys, queries, 24)[0, 0].tolist()
    assert len(kept) == 24 and kept == sorted(kept)
    assert set(range(88, 100)) <= set(kept)  # the window: half the budget
    assert {35, 36, 37, 38, 39} <= set(kept)  # the position and its neighbours


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("length", [15, 16, 17, 90])
def test_every_policy_keeps_distinct_ascending_entries_within_budget(policy: str, length: int) -> None:
    keys = torch.randn(2, 2, length, 4, generator=torch.Generator().manual_seed(1))
    budget = 0 if policy == "none" else 16
    kept = select(policy, keys, keys.unsqueeze(2).expand(-1, -1, 3, -1, -1), budget)
    assert kept.shape[:2] == (2, 2) and kept.shape[2] <= budget
    if length <= budget:
        assert kept[0, 0].tolist() == list(range(length))
    assert (kept.diff(dim=-1) > 0).all()
    assert ((kept >= 0) & (kept < length)).all()


def test_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown KV policy 'best'.*chunk_topk"):
        select("best", torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 1, 8, 4), 16)


def test_oracle_reads_scores_in_single_precision() -> None:
    """Half-precision keys must select as their exact float values do."""
    keys = torch.randn(1, 2, 96, 8, generator=torch.Generator().manual_seed(3)).half()
    assert torch.equal(reference.chunk_topk(keys, 32), reference.chunk_topk(keys.float(), 32))
