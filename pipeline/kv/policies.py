"""KV policies: which prefix entries a drafter keeps. A new policy is a function, a line of POLICIES,
and its name in `Policy` of config/sweep.py.

Shape legend: B batch rows, H key/value heads, G query heads per key/value head, S prefix length,
W observed queries, N kept entries, R ranked chunks, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import dispatch, reference

SINKS = 4  # first positions that `streaming` always keeps
SNAP_WINDOW = 16  # last queries that `snapkv` observes, and `target_guided` those of the target
SNAP_POOL = 5  # neighbours that share a `snapkv` score

Select = Callable[[Tensor, Tensor, int], Tensor]


def chunk_topk(keys_BHSD: Tensor, queries_BHGWD: Tensor, budget: int) -> Tensor:
    """The paper's rule; the partial last chunk is kept."""
    return dispatch.chunk_topk(keys_BHSD, budget)


def chunk_topk_paper(keys_BHSD: Tensor, queries_BHGWD: Tensor, budget: int) -> Tensor:
    """The paper's rule as its code has it: the partial last chunk is dropped."""
    return dispatch.chunk_topk(keys_BHSD, budget, keep_tail=False)


def streaming(keys_BHSD: Tensor, queries_BHGWD: Tensor, budget: int) -> Tensor:
    """The first few positions (attention sinks) and the most recent ones (StreamingLLM)."""
    return first_and_last(keys_BHSD, budget, SINKS)


def first_and_last(keys_BHSD: Tensor, budget: int, sinks: int) -> Tensor:
    """The first `sinks` positions and the most recent ones, [B, H, budget]."""
    B, H, S, _ = keys_BHSD.shape
    kept = torch.cat([torch.arange(sinks), torch.arange(S - budget + sinks, S)])
    return kept.to(keys_BHSD.device).expand(B, H, budget)


def snapkv(keys_BHSD: Tensor, queries_BHGWD: Tensor, budget: int) -> Tensor:
    """Positions that the last queries attend to most (SnapKV), and those last positions themselves.

    Attention weights are averaged over the window and over the query heads of one key/value head, then
    smoothed over neighbouring positions.
    """
    B, H, S, D = keys_BHSD.shape
    window = min(SNAP_WINDOW, budget // 2, queries_BHGWD.shape[3])
    earlier = S - window
    queries_BHGWD = queries_BHGWD[:, :, :, -window:]
    logits_BHGWS = queries_BHGWD.float() @ keys_BHSD.float().transpose(-1, -2).unsqueeze(2) / D**0.5
    future_WW = torch.ones(window, window, dtype=torch.bool, device=keys_BHSD.device).triu(1)
    logits_BHGWS[..., earlier:].masked_fill_(future_WW, -torch.inf)
    scores_BHS = logits_BHGWS.softmax(-1)[..., :earlier].mean(dim=(2, 3))
    scores_BHS = torch.nn.functional.avg_pool1d(scores_BHS, SNAP_POOL, stride=1, padding=SNAP_POOL // 2)
    best_BHN = scores_BHS.sort(dim=-1, descending=True, stable=True).indices[..., : budget - window]
    recent_BHN = torch.arange(earlier, S, device=keys_BHSD.device).expand(B, H, window)
    return torch.cat([best_BHN.sort(-1).values, recent_BHN], dim=-1)


def none(keys_BHSD: Tensor, queries_BHGWD: Tensor, budget: int) -> Tensor:
    """Nothing of the prefix: the policy of budget 0."""
    B, H, _, _ = keys_BHSD.shape
    return torch.empty(B, H, 0, dtype=torch.long, device=keys_BHSD.device)


POLICIES: dict[str, Select] = {
    "chunk_topk": chunk_topk,
    "chunk_topk_paper": chunk_topk_paper,
    "streaming": streaming,
    "snapkv": snapkv,
    "none": none,
}


def target_guided(keys_BHSD: Tensor, guide_BR: Tensor | None, budget: int) -> Tensor:
    """The chunks of 8 that the target attends to most (after SpecExtend, arXiv 2505.20776), and the tail.

    One choice for all layers and heads; otherwise as `chunk_topk`, which scores chunks by their keys.

    Args:
        guide_BR: chunks of the prefix, the best first, as `rank_chunks` gives them, or as many of these as
            the budget could hold. Numbers of chunks that there are not are passed over: a head has one entry
            less than a prefix has tokens.

    Raises:
        ValueError: if there is no ranking, or too few are ranked.
    """
    B, H, S, _ = keys_BHSD.shape
    if guide_BR is None:
        raise ValueError(f"the policy {GUIDED} needs a guide, the target's ranking of a prefix's chunks")
    if guide_BR.shape[1] < budget // reference.CHUNK:
        raise ValueError(f"the guide ranks {guide_BR.shape[1]} chunks, too few for a budget of {budget}")
    beyond_BR = guide_BR >= S // reference.CHUNK
    guide_BR = guide_BR.gather(1, beyond_BR.long().sort(dim=1, stable=True).indices)
    return reference.kept_chunks(guide_BR, S, budget).unsqueeze(1).expand(B, H, -1)


def rank_chunks(queries_BHGWD: Tensor, keys_BHSD: Tensor, scaling: float) -> Tensor:
    """A prefix's guide [B, C]: its whole chunks by the attention that the last W tokens pay them, best first.

    Chunk 0 comes before all. Queries and keys are those of the target's last layer.
    """
    return reference.ranked(dispatch.chunk_attention(queries_BHGWD, keys_BHSD, scaling))


GUIDED = "target_guided"  # chooses by what the target says of a prefix
WINDOW = "window"  # rolls: what it keeps of a prefix is what its first query may see


def select(
    policy: str,
    keys_BHSD: Tensor,
    queries_BHGWD: Tensor,
    budget: int,
    sinks: int = 0,
    guide_BR: Tensor | None = None,
) -> Tensor:
    """Ascending indices [B, H, N] of the prefix entries that `policy` keeps, N <= budget.

    A prefix within the budget is kept whole, whatever the policy.

    Args:
        sinks: first positions that a window always sees.
        guide_BR: what `target_guided` chooses by.

    Raises:
        ValueError: for a policy that does not exist, or one that lacks its guide.
    """
    known = (*POLICIES, WINDOW, GUIDED)
    if policy not in known:
        raise ValueError(f"unknown KV policy {policy!r}; there are {', '.join(known)}")
    B, H, S, _ = keys_BHSD.shape
    if budget >= S:
        return torch.arange(S, device=keys_BHSD.device).expand(B, H, S)
    if policy == WINDOW:
        return first_and_last(keys_BHSD, budget, sinks)
    if policy == GUIDED:
        return target_guided(keys_BHSD, guide_BR, budget)
    return POLICIES[policy](keys_BHSD, queries_BHGWD, budget)
