"""How a head begins: in the shape of its target, as the target's last layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.build import prepare_model
from pipeline.models.heads.eagle import FeatureHead, HeadConfig
from pipeline.models.layers import FAMILY


def default_layers(layers: int) -> list[int]:
    """The target's layers whose inputs engines take as features where a head names none."""
    return [2, layers // 2, layers - 3]


def head_config(
    target: PreTrainedModel, proposable: int, feature_layers: Sequence[int] | None, **options: bool
) -> HeadConfig:
    """The shape of a head over a target that can propose so many tokens; `options` are of `HeadConfig`."""
    given = target.config.get_text_config(decoder=True)
    H, heads = given.hidden_size, given.num_attention_heads
    rope = getattr(given, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}
    return HeadConfig(
        feature_layers=feature_layers or default_layers(given.num_hidden_layers),
        target_hidden_size=H,
        draft_vocab_size=proposable,
        vocab_size=target.whole_tokens,
        hidden_size=H,
        intermediate_size=given.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(given, "num_key_value_heads", None) or heads,
        head_dim=getattr(given, "head_dim", None) or H // heads,
        rms_norm_eps=getattr(given, "rms_norm_eps", 1e-6),
        max_position_embeddings=given.max_position_embeddings,
        rope_parameters=dict(rope),
        bos_token_id=given.bos_token_id,
        eos_token_id=given.eos_token_id,
        **options,
    )


@torch.no_grad()
def head_of(
    target: PreTrainedModel,
    tokens_V: Tensor,
    feature_layers: Sequence[int] | None = None,
    seed: int = 0,
    **options: bool,
) -> FeatureHead:
    """A head that begins as the target's last layer, which reads the last of the features.

    What has no likeness in the target is small and random; so is the whole layer where the target is of
    another family than Llama's.

    Args:
        target: in fp32.
        tokens_V: the draft vocabulary, ascending.
        options: of `HeadConfig`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = FeatureHead(head_config(target, len(tokens_V), feature_layers, **options))
    head.lm_head.tokens = tokens_V
    head.lm_head.weight.copy_(target.get_output_embeddings().weight[tokens_V])
    if target.config.model_type in FAMILY:
        begin_as_last_layer(head, target)
    head.attach(target.get_input_embeddings().weight)
    head = prepare_model(head, target.whole_tokens)
    head.num_tokens = len(tokens_V)
    return head


def begin_as_last_layer(head: FeatureHead, target: PreTrainedModel) -> None:
    last: Any = target.base_model.layers[-1]
    mine, H = head.midlayer, head.config.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(mine.self_attn, name).weight[:, H:] = getattr(last.self_attn, name).weight
    mine.self_attn.o_proj.weight.copy_(last.self_attn.o_proj.weight)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(mine.mlp, name).weight.copy_(getattr(last.mlp, name).weight)
    mine.hidden_norm.weight.copy_(last.input_layernorm.weight)
    mine.post_attention_layernorm.weight.copy_(last.post_attention_layernorm.weight)
    head.norm.weight.copy_(target.base_model.norm.weight)
    head.fc.weight[:, -H:] += torch.eye(H)
