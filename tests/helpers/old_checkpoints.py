"""The weights of today's tiny models, as older releases of transformers named them."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def old_gpt2(state: State) -> State:
    """As the hub has GPT-2: the layers' names without their prefix, no head, and each layer's mask."""
    state = {
        name.removeprefix("transformer."): value for name, value in state.items() if "lm_head" not in name
    }
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def old_neox(state: State) -> State:
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = torch.ones(6)
    return {name: state[name] for name in sorted(state)}


def old_opt(state: State) -> State:
    return {name.removeprefix("model."): value for name, value in state.items() if name != "lm_head.weight"}


def old_mixtral(state: State) -> State:
    """As the hub has Mixtral: a tensor for each projection of each expert."""
    old: State = {}
    for name, value in state.items():
        layers, _, rest = name.partition(".mlp.")
        if "experts.gate_up_proj" in rest:
            for expert, both in enumerate(value):
                for number, half in zip((1, 3), both.chunk(2), strict=True):
                    old[f"{layers}.block_sparse_moe.experts.{expert}.w{number}.weight"] = half.clone()
        elif "experts.down_proj" in rest:
            for expert, down in enumerate(value):
                old[f"{layers}.block_sparse_moe.experts.{expert}.w2.weight"] = down.clone()
        else:
            old[name.replace(".mlp.", ".block_sparse_moe.")] = value
    return old
