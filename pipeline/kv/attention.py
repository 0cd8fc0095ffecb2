"""Attention of new tokens over cached and new keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# What an architecture's attention may be given beside queries, keys and values, and views have not.
BEYOND_A_PRODUCT = {
    "softcap": "a cap on attention scores (softcap)",
    "s_aux": "attention sinks (s_aux)",
    "position_bias": "biases by position (position_bias)",
    "head_mask": "a mask of heads (head_mask)",
    "attention_bias": "biases on attention scores (attention_bias)",
}


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


def suffix_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """Which of the stored tokens the last Q of them see, [G·Q, S]; None where Q is 1."""
    Q, stored, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if Q == 1:
        return None
    mask = torch.ones(Q, stored, dtype=torch.bool, device=query.device).tril(stored - Q)
    return mask.repeat(groups, 1)
