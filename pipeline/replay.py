"""Exact acceptance of every γ from one forward pass of the drafter.

Greedy speculation is lossless: whatever the drafter proposes, the emitted tokens are the target's greedy
continuation. A view is fixed when the prefix ends, and behind it the drafter only ever builds on emitted
tokens. So one teacher-forced forward over the stored continuation says, for each token, whether the drafter
would have proposed it (`match`), and the rounds of any γ follow by counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.kv import PrefixView, ViewCache, read_continuation


@dataclass(frozen=True)
class Counts:
    """What the rounds of one continuation add up to. Position i is the (i+1)-th proposal of a round."""

    num_tokens: int
    num_rounds: int
    num_proposed: int
    num_accepted: int
    reached: tuple[int, ...]
    kept: tuple[int, ...]


# Not inference mode: training validates with this, and weights that ZeRO-3 gathers meanwhile live on.
@torch.no_grad()
def match_views(
    drafter: PreTrainedModel, views: Sequence[PrefixView], continuation: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Whether the drafter, behind each view, would propose each token of a greedy continuation.

    Args:
        views: R views with one row each, all cut at the same prefix length.
        continuation: [M] tokens, the first being the one that the prefill gives.

    Returns:
        On the CPU: booleans [R, M - 1], column t being for `continuation[t + 1]`, and [R] whether all logits
        behind a view were finite; where they were not, its row means nothing.
    """
    device, prefix_tokens = drafter.device, views[0].prefix_tokens
    tokens_M = torch.tensor(continuation, device=device)
    inputs = tokens_M.shape[0] - 1
    # Equal lengths side by side share one attention call; rows are put back in the caller's order below.
    order = sorted(range(len(views)), key=lambda row: views[row].kept)
    cache = ViewCache([views[row] for row in order], capacity=inputs)
    positions_1Q = torch.arange(prefix_tokens, prefix_tokens + inputs, device=device).unsqueeze(0)
    logits_RQV = read_continuation(drafter, cache, tokens_M[:-1].expand(len(views), inputs), positions_1Q)
    back = torch.tensor(order, device=device).argsort()
    match_RQ = logits_RQV.argmax(-1) == tokens_M[1:]
    finite_R = torch.isfinite(logits_RQV).flatten(1).all(1)
    return match_RQ[back].cpu(), finite_R[back].cpu()


def rounds(match: Sequence[bool], gamma: int, limit: int, ends_with_eos: bool) -> list[tuple[int, int, int]]:
    """(proposed, accepted, emitted) of each round, as decoding has them.

    Args:
        match: one boolean per token after the first of a continuation.
        limit: most tokens of a continuation, the first included; a round proposes at most what is left.
        ends_with_eos: the continuation ended by itself, so proposals behind its end do not count.
    """
    result, start, total = [], 0, len(match)
    while start < total:
        accepted = 0
        while accepted < gamma and start + accepted < total and match[start + accepted]:
            accepted += 1
        emitted = min(accepted + 1, total - start)
        proposed = min(gamma, limit - 1 - start)
        start += emitted
        if start == total and ends_with_eos:
            proposed = min(proposed, emitted)
        result.append((proposed, accepted, emitted))
    return result


def count(rounds: Sequence[tuple[int, int, int]], gamma: int) -> Counts:
    """Add up (proposed, accepted, emitted) rounds of at most `gamma` proposals."""
    reached, kept = [0] * gamma, [0] * gamma
    for proposed, accepted, _ in rounds:
        for position in range(min(accepted + 1, proposed)):
            reached[position] += 1
            kept[position] += position < accepted
    return Counts(
        num_tokens=sum(emitted for _, _, emitted in rounds),
        num_rounds=len(rounds),
        num_proposed=sum(proposed for proposed, _, _ in rounds),
        num_accepted=sum(accepted for _, accepted, _ in rounds),
        reached=tuple(reached),
        kept=tuple(kept),
    )
