"""Logits from final states against each architecture's own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model
from pipeline.models.head import LOUD, own_logits, plain_head
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.zoo import plain_model, tiny

# Architectures, and whether their logits are the head's product with the final states and nothing else.
HEADS: list[tuple[str, dict[str, Any], bool]] = [
    ("llama", {}, True),
    ("mixtral", {}, True),
    ("gpt2", {}, True),
    ("opt", {}, True),  # whose last layer projects the states to another width
    ("gemma3_text", {"final_logit_softcapping": None}, True),
    ("granite", {"logits_scaling": 1.0}, True),
    ("cohere", {"logit_scale": 1.0}, True),
    ("gemma3_text", {}, False),
    ("granite", {}, False),
    ("cohere", {}, False),
    ("phi", {}, False),  # a bias
]
NAMES = [f"{name}{list(changes.values())}" for name, changes, _ in HEADS]


def made(name: str, changes: dict[str, Any]) -> PreTrainedModel:
    return prepare_model(plain_model(tiny(name, **changes)), VOCABULARY)


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes", "plain"), HEADS, ids=NAMES)
def test_logits_are_the_models_own(name: str, changes: dict[str, Any], plain: bool) -> None:
    model, tokens = made(name, changes), random_tokens(2, 20)
    output = model(input_ids=tokens, use_cache=False)
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(own_logits(model, states), output.logits, atol=1e-6, rtol=1e-6)
    # Of any shape, as decoding and losses have them.
    torch.testing.assert_close(own_logits(model, states[0, 3]), output.logits[0, 3], atol=1e-6, rtol=1e-6)

    product = states @ model.get_output_embeddings().weight.T
    assert torch.allclose(product, output.logits, rtol=1e-4, atol=1e-5) == plain
    head = plain_head(model)
    assert (head is not None) == plain
    if head is not None:
        assert head.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    # The model is left as it was.
    torch.testing.assert_close(model(input_ids=tokens, use_cache=False).logits, output.logits)


def test_the_head_ends_with_the_tokenizer() -> None:
    head = plain_head(prepare_model(plain_model(tiny("llama")), VOCABULARY - 7))
    assert head is not None and head.shape == (VOCABULARY - 7, 48)


@torch.no_grad()
def test_a_cap_that_quiet_states_do_not_reach_is_found() -> None:
    model = made("gemma3_text", {"final_logit_softcapping": 500.0})
    states = torch.randn(4, 48)
    torch.testing.assert_close(
        model.get_output_embeddings()(states), own_logits(model, states), rtol=1e-3, atol=1e-3
    )
    assert plain_head(model) is None and LOUD > 500


def test_gradients_flow_through_the_models_own_logits() -> None:
    model = made("granite", {})
    states = torch.randn(5, 48, requires_grad=True)
    (ours,) = torch.autograd.grad(own_logits(model, states).square().sum(), states)
    weight = model.get_output_embeddings().weight.detach()
    logits = states.detach() @ weight.T / 8
    torch.testing.assert_close(ours, 2 / 8 * logits @ weight, atol=1e-4, rtol=1e-4)


def test_layers_come_back_when_a_head_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", {})
    layers = model.model

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        own_logits(model, torch.randn(3, 48))
    assert model.model is layers


@pytest.mark.parametrize("change", ["bias", "another kind", "partitioned"])
def test_heads_that_are_no_plain_product(change: str) -> None:
    model = copy.deepcopy(made("llama", {}))
    assert plain_head(model) is not None
    head = model.get_output_embeddings()
    if change == "bias":
        head.bias = nn.Parameter(torch.zeros(VOCABULARY))
    elif change == "another kind":
        model.set_output_embeddings(nn.Sequential(head))
    else:
        head.weight.ds_id = 3  # as DeepSpeed's ZeRO-3 marks it
    assert plain_head(model) is None


@torch.no_grad()
def test_our_attention_makes_no_difference() -> None:
    model = made("gpt2", {})
    states = torch.randn(2, 3, 48)
    before = own_logits(model, states)
    model.set_attn_implementation(ATTENTION)
    torch.testing.assert_close(own_logits(model, states), before)
