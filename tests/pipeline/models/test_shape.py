"""Sizes of models that have no weights, against models that have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.config.models import ScratchModel
from pipeline.models.build import build_random
from pipeline.models.shape import Shape, shape_of, shape_of_model
from tests.helpers.configs import SCRATCH, config_with
from tests.helpers.tiny import tiny_config

SHAPE = Shape(parameters=1000, layers=1, hidden=10, query=10, kv=10, intermediate=20, vocab=60)


@pytest.mark.parametrize("change", [{}, {"layers": 3, "kv_heads": 4, "hidden": 48, "heads": 8}])
def test_a_scratch_model_has_the_parameters_that_were_counted(change: dict[str, int]) -> None:
    spec = ScratchModel.model_validate({**SCRATCH, **change})
    model = build_random(spec, 301)
    shape = shape_of(config_with(target=change), "target", 301)
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert shape == shape_of_model(model)


def test_a_pretrained_model_is_read_from_its_config_alone(tmp_path: Path) -> None:
    given = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    given.save_pretrained(tmp_path / "model")
    spec = {"kind": "pretrained", "path": str(tmp_path / "model")}
    config = tiny_config({"target": spec})
    weights = sum(weight.numel() for weight in Qwen3ForCausalLM(given).parameters())
    assert shape_of(config, "target", 0) == Shape(weights, 2, 32, 64, 32, 48, 300, heads=4)


def test_a_draft_vocabulary_saves_products_and_takes_a_copy_of_its_rows() -> None:
    few = replace(SHAPE, proposable=20)
    assert (few.logits, SHAPE.logits) == (20, 60)
    assert SHAPE.forward_flops(7, 0) - few.forward_flops(7, 0) == 7 * 2 * 10 * (60 - 20)
    assert few.weights - SHAPE.weights == 4 * 10 * 20
