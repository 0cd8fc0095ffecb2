"""Drafters of kind `first_layers`: layers of the target between its own embedding, final norm and head.

What lies around the layers is the target's and stays: training touches the layers alone, and processes that
hold both models hold it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Architectures whose layers are alike, so that a model of some of them is a model of the same kind.
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


def problem_of_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> str | None:
    """Why no drafter can be made of these layers of a target; None where it can."""
    if config.model_type not in FAMILY:
        known = ", ".join(FAMILY)
        return f"the target is a {config.model_type}, and first_layers is for {known}: take another kind"
    if layers[-1] >= config.num_hidden_layers:
        last = config.num_hidden_layers - 1
        return f"drafter.layers: {list(layers)} goes beyond the target's layers, 0 to {last}"
    return None


def keep_layers(model: PreTrainedModel, layers: tuple[int, ...]) -> PreTrainedModel:
    """The same model, left with some of its layers; its config says so, so that it loads as it is saved."""
    stack = model.base_model.layers
    model.base_model.layers = nn.ModuleList(stack[index] for index in layers)
    for number, layer in enumerate(model.base_model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    name_layers(model.config, layers)
    return model


def name_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> None:
    """Let a config say that a model has these of its layers alone."""
    config.num_hidden_layers = len(layers)
    if types := getattr(config, "layer_types", None):
        config.layer_types = [types[index] for index in layers]


def freeze_around_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Embedding, final norm and head get no gradients."""
    model.requires_grad_(False)
    model.base_model.layers.requires_grad_(True)
    return model


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """By name, those that training changes."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


@torch.no_grad()
def share_frozen(model: PreTrainedModel, others: Iterable[PreTrainedModel]) -> None:
    """Let embedding, final norm and head be the memory of another model that holds the same numbers."""
    for other in others if model.config.model_type in FAMILY else ():
        if other.config.model_type != model.config.model_type:
            continue
        for ours, theirs in zip(around_layers(model), around_layers(other), strict=True):
            if same(ours.weight, theirs.weight):
                ours.weight = theirs.weight


def around_layers(model: PreTrainedModel) -> list[Any]:
    return [model.get_input_embeddings(), model.base_model.norm, model.get_output_embeddings()]


def same(ours: Tensor, theirs: Tensor) -> bool:
    alike = ours.dtype == theirs.dtype and ours.device == theirs.device and ours.shape == theirs.shape
    return alike and torch.equal(ours, theirs)
