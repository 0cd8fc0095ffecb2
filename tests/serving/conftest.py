"""One target for all tests of serving, and its text as vLLM gives it without speculation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model
from pipeline.models.export import export_model
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer
from tests.helpers.vllm import PROMPTS, Served, longer, serve


@pytest.fixture(scope="session")
def target() -> PreTrainedModel:
    """Of a shape that vLLM's attention takes, and whose text is not one token."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
        initializer_range=0.15,
    )  # fmt: skip
    return prepare_model(LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION), VOCABULARY)


@pytest.fixture(scope="session")
def folder(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("target")
    export_model(target, tiny_tokenizer(), made)
    return made


@pytest.fixture(scope="session")
def texts(target: PreTrainedModel) -> list[list[int]]:
    """transformers' greedy texts, some rounds longer than what is served."""
    return [longer(target, tokens) for tokens in PROMPTS]


@pytest.fixture(scope="session")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(tmp_path_factory.mktemp("plain"), folder, None)
