"""Tiny random models of many architectures, by the names that transformers has for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model
from pipeline.models.load import ModelRef
from tests.helpers.tiny import VOCABULARY, save_model

POSITIONS = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # else models say again what they read
}
ALL_HEADS = {"num_key_value_heads": 4}
# What an architecture has besides the shape, or otherwise.
OWN: dict[str, dict[str, Any]] = {
    "bart": {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "cohere": {"logit_scale": 0.25},
    "deepseek_v3": {
        **ALL_HEADS,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "gemma2": {"head_dim": 12},
    "gemma3_text": {"head_dim": 12, "final_logit_softcapping": 5.0, "sliding_window": 40},
    "gpt_oss": {"head_dim": 12, "num_local_experts": 2, "num_experts_per_tok": 1},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "mistral": {"sliding_window": 40},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 24, "dropout": 0.0},
    "persimmon": ALL_HEADS,
    "phi3": {},
    "stablelm": {"hidden_size": 64},
}  # fmt: skip


def tiny(name: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(name, **{**SHAPE, **OWN.get(name, {}), **changes})


def plain_model(config: PretrainedConfig, seed: int = 3) -> PreTrainedModel:
    """Random weights under transformers' own attention, large enough that the arg-max depends on the text."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model.eval()


def our_model(config: PretrainedConfig, seed: int = 3) -> PreTrainedModel:
    """The same weights under our attention, without what `load_model` asks of a model."""
    model = plain_model(config, seed)
    model.set_attn_implementation(ATTENTION)
    return prepare_model(model, VOCABULARY)


def saved(config: PretrainedConfig, folder: Path, seed: int = 3, **reference: Any) -> ModelRef:
    """The folder of such a model, with the tiny tokenizer."""
    return ModelRef(save_model(plain_model(config, seed), folder).path, **reference)
