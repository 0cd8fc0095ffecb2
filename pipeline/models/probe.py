"""What a model attends with, layer by layer: asked by a pass over two tokens that computes no attention.

It needs no weights: a model on the meta device answers, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.moe import ExpertsInterface

from pipeline.kv.attention import BEYOND_A_PRODUCT

PROBE = "budgetdraft-probe"  # the attention, and the experts, of a model that is asked


class Call(NamedTuple):
    """What a layer attends with: shapes of keys and values, its window, and what it is given beside these."""

    layer: int
    key: tuple[int, ...]
    value: tuple[int, ...]
    window: int | None
    causal: bool
    others: tuple[str, ...]


class NoLayers(list[Any]):
    """The layers of a cache that has none; a model that looks for one keeps more there than it attends to."""

    def __getitem__(self, index: Any) -> Any:
        raise LookupError("its layers remember more than keys and values")


class Calls(Cache):
    """Takes the place of a cache, and notes each layer's call."""

    def __init__(self) -> None:
        super().__init__(layers=NoLayers())
        self.calls: list[Call] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def note_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    view_cache: Calls | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers that attends to nothing."""
    others = [words for name, words in BEYOND_A_PRODUCT.items() if kwargs.get(name) is not None]
    others += ["a mask of its own"] if attention_mask is not None else []
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    if view_cache is None:
        raise LookupError("its layers do not hand keywords on to their attention")
    layer: Any = module.layer_idx
    shapes = tuple(key.shape), tuple(value.shape)
    view_cache.calls.append(Call(layer, *shapes, sliding_window, causal, tuple(others)))
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def no_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts that say nothing. Those of transformers ask which tokens come to them."""
    return torch.zeros_like(hidden_states)


AttentionInterface.register(PROBE, note_call)
ExpertsInterface.register(PROBE, no_experts)


def probe(model: PreTrainedModel) -> tuple[list[Call], Exception | None]:
    """The calls of a model under the attention PROBE, and what ended the pass early, if anything did."""
    calls = Calls()
    tokens_12 = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    positions_12 = torch.arange(2, device=model.device).unsqueeze(0)
    try:
        with torch.no_grad():
            model(
                input_ids=tokens_12,
                position_ids=positions_12,
                past_key_values=calls,
                view_cache=calls,
                use_cache=True,
            )
    except Exception as error:  # whatever an architecture's own code raises
        return calls.calls, error
    return calls.calls, None
