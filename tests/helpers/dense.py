"""Forward passes without any cache, as the oracle of training behind views, and gradients to compare.

An attention function of its own sees whole sequences, detaches the prefix's keys and values, and hides what a
policy does not keep with a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from pipeline.axes import View
from pipeline.kv.policies import SNAP_WINDOW, select
from pipeline.kv.views import span_of


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cut: tuple[int, View, bool],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of prefix and window at once: [B, H·G, T, D], with `cut` = (prefix length, view, detach)."""
    start, view, detach = cut
    if detach:
        key = torch.cat([key[:, :, :start].detach(), key[:, :, start:]], 2)
        value = torch.cat([value[:, :, :start].detach(), value[:, :, start:]], 2)
    B, H, T, _ = key.shape
    queries = query.unflatten(1, (H, -1))
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, H, T, T).clone()
    if (span := span_of(view)) is not None:
        query_T1, key_T = torch.arange(T).unsqueeze(1), torch.arange(T)
        seen &= (key_T < span.sinks) | (key_T > query_T1 - span.recent)
    elif view.budget != "full":
        observed = queries[:, :, :, max(0, start - SNAP_WINDOW) : start]
        kept = select(view.policy, key[:, :, :start].detach(), observed.detach(), view.budget)
        prefix = torch.zeros(B, H, start, dtype=torch.bool).scatter_(2, kept, True)
        seen[:, :, start:, :start] = prefix.unsqueeze(2)
    scores = (queries @ key.unsqueeze(2).transpose(-1, -2)) * scaling
    weights = scores.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1)
    return (weights @ value.unsqueeze(2)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register("dense", dense_attention)


def dense_logits(
    model: PreTrainedModel, tokens_BS: Tensor, start: int, view: View, detach: bool = True
) -> Tensor:
    """Logits [B, S - start, V] of what follows a prefix of `start` tokens, behind its view."""
    model.set_attn_implementation("dense")
    output = model(input_ids=tokens_BS, use_cache=False, cut=(start, view, detach))
    model.set_attn_implementation("budgetdraft")
    return output.logits[:, start:]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}  # type: ignore[union-attr]


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The loss itself is in single precision, so a little less than double."""
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(ours[name], gradient, atol=2e-5 * scale, rtol=1e-4, msg=name)
