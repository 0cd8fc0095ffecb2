"""Attention of new tokens over cached and new keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # queries whose window is masked at a time

# What an architecture's attention may be given beside queries, keys and values, and views have not.
BEYOND_A_PRODUCT = {
    "softcap": "a cap on attention scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "biases by position (position_bias)",
    "head_mask": "a mask of heads (head_mask)",
    "attention_bias": "biases on attention scores (attention_bias)",
}


class Span(NamedTuple):
    """What a query sees through a window: of all that is stored, the first `sinks` and the last `recent`."""

    sinks: int
    recent: int


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Plain causal self-attention of a whole sequence, [B, H·G, S, D]."""
    groups = query.shape[1] // key.shape[1]
    # On CUDA only the half-precision kernels know grouped heads; the fallback builds S × S scores.
    grouped = groups > 1 and (query.device.type == "cpu" or query.dtype != torch.float32)
    if groups > 1 and not grouped:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of the last Q of the stored tokens, [B, H·G, Q, D]; each sees all that is stored before it.

    The query heads of one key/value head are folded into the query length, so keys are not repeated.

    Args:
        mask: as `suffix_mask` makes it, where a caller has it already.
    """
    mask = suffix_mask(query, key) if mask is None else mask
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    output = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(query.shape)


def suffix_mask(query: Tensor, key: Tensor, span: Span | None = None) -> Tensor | None:
    """Which of the stored tokens the last Q of them see, [G·Q, S]; None where a single one sees all."""
    Q, stored, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if Q == 1 and span is None:
        return None
    before = torch.ones(Q, stored, dtype=torch.bool, device=query.device)
    mask = before.tril(stored - Q)
    if span is not None:
        beyond = before.tril(stored - Q - span.recent)
        beyond[:, : span.sinks] = False
        mask &= ~beyond
    return mask.repeat(groups, 1)


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, span: Span) -> Tensor:
    """As `suffix_attention`, each query through its window.

    A block of queries is given the sinks and what its windows reach, so that scores grow with the window and
    not with all that is stored.
    """
    parts: list[Tensor] = []
    first = key.shape[2] - query.shape[2]  # the slot of a block's first query
    for block in query.split(BLOCK, 2):
        end, begin = first + block.shape[2], max(first + 1 - span.recent, span.sinks)
        keys, values = (
            # Distances behind the sinks stay what they were.
            torch.cat([part[:, :, : span.sinks], part[:, :, begin:end]], 2)
            for part in (key[:, :, :end], value[:, :, :end])
        )
        mask = suffix_mask(block, keys, span)
        parts.append(suffix_attention(block, keys, values, scaling, mask))
        first = end
    return torch.cat(parts, 2)
