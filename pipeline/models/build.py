"""Models from nothing, of a config's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.kv.view_cache import ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.models import ScratchModel


def prepare_model(model: PreTrainedModel, num_tokens: int) -> PreTrainedModel:
    """Evaluation mode, and the number of logits that stand for tokens.

    `whole_tokens` are those of the tokenizer; `num_tokens` are fewer where there is a draft vocabulary.
    """
    model.num_tokens = model.whole_tokens = num_tokens
    return model.eval()


def scratch_config(spec: ScratchModel, vocab_size: int, **tokens: int | None) -> LlamaConfig:
    """A Llama of the given shape; `tokens` are its special ones, as transformers names them."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta, **(spec.rope_scaling or {})},
        tie_word_embeddings=True,
        **tokens,
    )


def build_scratch(spec: ScratchModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A randomly initialised Llama of the given shape; the same seed gives the same weights."""
    return build_random(
        spec,
        len(tokenizer),
        seed,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_random(spec: ScratchModel, vocab_size: int, seed: int = 0, **tokens: int | None) -> PreTrainedModel:
    """The same before there is a tokenizer; `tokens` as of `scratch_config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(
            scratch_config(spec, vocab_size, **tokens), attn_implementation=ATTENTION
        )
    return prepare_model(model, vocab_size)
