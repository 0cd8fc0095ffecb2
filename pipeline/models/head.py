"""From final hidden states to the logits that a model itself gives.

Some architectures scale or cap their logits behind the head, others scale the states before it. So logits are
made by the model's own forward pass, and the head's weight stands for it only where both agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from pipeline.models.draft_vocabulary import DraftHead

LOUD = 1e3  # scale of random states that no cap on logits leaves as they are


@dataclass
class Output(MoeModelOutputWithPast):
    """What the layers of any architecture return, as far as the code behind them asks for it."""

    cross_attentions: None = None


class GivenStates(nn.Module):
    """Stands in for a model's layers, and for each module among them: returns states that are there already.

    Other attributes are those of the layers.
    """

    def __init__(self, layers: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["layers"], self.__dict__["hidden"] = layers, hidden

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["layers"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *args: Any, **kwargs: Any) -> Output:
        return Output(last_hidden_state=self.__dict__["hidden"])


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [..., V] of final hidden states [..., C], by the model's own forward pass behind its layers.

    Not for models whose weights are partitioned over processes.
    """
    flat_1NC = hidden.reshape(1, -1, hidden.shape[-1])
    name = model.base_model_prefix
    layers = model._modules[name]
    assert layers is not None
    model._modules[name] = GivenStates(layers, flat_1NC)
    try:
        output = model(inputs_embeds=flat_1NC, use_cache=False)
    finally:
        model._modules[name] = layers
    logits: Tensor = output.logits
    return logits.reshape(*hidden.shape[:-1], -1)


def plain_head(model: PreTrainedModel) -> Tensor | None:
    """The head [V, C] of a model whose logits are hidden states times head and nothing else; else None.

    With a draft vocabulary, its rows alone.

    None also where DeepSpeed has partitioned the weight, which is whole inside its module's forward only.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear | DraftHead) or head.bias is not None or hasattr(head.weight, "ds_id"):
        return None
    with torch.no_grad():
        loud = torch.linspace(-LOUD, LOUD, head.in_features).to(head.weight)
        plain = torch.allclose(own_logits(model, loud), head(loud), rtol=1e-3)
    if not plain:
        return None
    return head.rows if isinstance(head, DraftHead) else head.weight[: model.num_tokens]
