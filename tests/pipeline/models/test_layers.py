"""Drafters that are layers of their target: as the target computes them, saved, shared, frozen, refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from pipeline.config.models import FirstLayers
from pipeline.errors import BadData
from pipeline.models.layers import freeze_around_layers, share_frozen, trained_parameters
from pipeline.models.load import ModelRef, layers_ref, load_model
from tests.helpers.models import random_tokens
from tests.helpers.tiny import TRAIN, VOCABULARY, Workshop, tiny_config
from tests.helpers.zoo import saved, tiny

TOKENS = random_tokens(2, 30)


@torch.no_grad()
def by_hand(model: PreTrainedModel, layers: tuple[int, ...]) -> Tensor:
    """Logits of chosen layers, one module called after another."""
    inner = model.model
    hidden = inner.embed_tokens(TOKENS)
    positions = torch.arange(TOKENS.shape[1]).unsqueeze(0)
    mask = create_causal_mask(
        config=model.config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    turns = inner.rotary_emb(hidden, positions)
    for index in layers:
        out = inner.layers[index](
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=turns
        )
        hidden = out[0] if isinstance(out, tuple) else out
    logits: Tensor = model.lm_head(inner.norm(hidden))
    return logits


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", [(0,), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_the_layers_are_the_targets(tmp_path: Path, name: str, layers: tuple[int, ...]) -> None:
    config = tiny(name, num_hidden_layers=4)
    ref = saved(config, tmp_path / "target", reach=40)
    model = AutoModelForCausalLM.from_pretrained(ref.path, attn_implementation="eager").eval()
    drafter = load_model(replace(ref, layers=layers), VOCABULARY)
    with torch.no_grad():
        logits = drafter(TOKENS).logits
    torch.testing.assert_close(logits, by_hand(model, layers), atol=1e-5, rtol=1e-5)
    if len(layers) == 4:
        torch.testing.assert_close(logits, model(TOKENS).logits, atol=1e-5, rtol=1e-5)
    drafter.save_pretrained(tmp_path / "drafter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "drafter", attn_implementation="eager").eval()
    torch.testing.assert_close(again(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "layers", "told"),
    [
        (lambda: tiny("llama"), (0, 7), r"drafter.layers: \[0, 7\] goes beyond the target's layers, 0 to 1"),
        (lambda: tiny("gpt2"), (0,), "the target is a gpt2, and first_layers is for llama, mistral"),
    ],
    ids=["beyond", "gpt2"],
)
def test_what_cannot_be_made_is_named(
    tmp_path: Path, config: Callable[[], PretrainedConfig], layers: tuple[int, ...], told: str
) -> None:
    ref = saved(config(), tmp_path / "target", role="drafter", layers=layers, reach=64)
    with pytest.raises(BadData, match=told):
        load_model(ref, VOCABULARY)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1]])
def test_layers_are_named_in_order(layers: list[int]) -> None:
    with pytest.raises(ValidationError):
        FirstLayers.model_validate({"kind": "first_layers", "layers": layers})


def test_a_scratch_target_has_these_layers() -> None:
    tiny_config({"drafter": {"kind": "first_layers", "layers": [0, 1]}})
    with pytest.raises(ValidationError, match=r"\[1, 2\] goes beyond the target's layers, 0 to 1"):
        tiny_config({"drafter": {"kind": "first_layers", "layers": [1, 2]}})


def test_what_lies_around_the_layers_is_held_once(tmp_path: Path, target: PreTrainedModel) -> None:
    target.save_pretrained(tmp_path / "target")
    whole = ModelRef(str(tmp_path / "target"))
    models = [
        load_model(ref, VOCABULARY)
        for ref in (whole, replace(whole, layers=(0,)), replace(whole, layers=(1,)))
    ]
    with torch.no_grad():
        before = [model(TOKENS).logits for model in models]
        models[2].model.norm.weight += 1  # a norm of its own stays its own
        other = models[2](TOKENS).logits
        for number, model in enumerate(models):
            share_frozen(model, models[:number])
        assert torch.equal(models[1](TOKENS).logits, before[1]) and torch.equal(
            models[2](TOKENS).logits, other
        )
    places = [{weight.data_ptr() for weight in model.parameters()} for model in models]
    assert len(places[0] & places[1]) == 2  # embedding, which is the head, and norm
    assert models[2].model.norm.weight is not models[0].model.norm.weight
    assert models[2].lm_head.weight is models[0].lm_head.weight is models[0].model.embed_tokens.weight


def test_training_touches_the_layers_alone(tmp_path: Path, target: PreTrainedModel) -> None:
    workshop = Workshop(tmp_path, target, target)
    layers = {"drafter": {"kind": "first_layers", "layers": [0]}}
    workshop.drafter = layers_ref(workshop.target, FirstLayers.model_validate(layers["drafter"]))
    folder = workshop.train("whole", TRAIN | layers)
    made = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, weight in made.named_parameters():
        same = torch.equal(weight, target.state_dict()[name])
        assert same is not name.startswith("model.layers."), name
    assert (
        "- Layers of the target: 0; its embedding, norm and head"
        in (folder / "model" / "README.md").read_text()
    )


def test_only_the_layers_have_gradients(target: PreTrainedModel, tmp_path: Path) -> None:
    target.save_pretrained(tmp_path / "target")
    model = freeze_around_layers(load_model(ModelRef(str(tmp_path / "target"), layers=(0,)), VOCABULARY))
    model(TOKENS).logits.logsumexp(-1).mean().backward()
    trained = {name for name, _ in trained_parameters(model)}
    assert trained == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained and all(name.startswith("model.layers.0.") for name in trained)
