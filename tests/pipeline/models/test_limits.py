"""How long a text each kind of model can read, against where transformers' own models change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.kv.view_cache import ATTENTION
from pipeline.models.limits import Limit, limits_of, limits_of_loaded, longest_text, problem_of_length
from pipeline.models.probe import PROBE, probe
from tests.helpers.models import random_tokens
from tests.helpers.tiny import tiny_config
from tests.helpers.zoo import our_model, plain_model, tiny

FACTORS = [2.0] * 6
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": FACTORS}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


def limits(config: PretrainedConfig) -> list[Limit]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=PROBE)
    return limits_of(model, probe(model)[0])


CHANGING: list[tuple[str, dict[str, Any], int]] = [
    ("mistral", {}, 40),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}, 40),
    ("llama", {"rope_parameters": DYNAMIC}, 64),
    ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 24}}, 24),
    (
        "gemma3_text",
        {
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT},
        },
        64,
    ),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes", "tokens"), CHANGING)
def test_a_model_is_the_same_up_to_its_limit(name: str, changes: dict[str, Any], tokens: int) -> None:
    """The logits of the last token but one do not depend on the last, until there is one token too many.

    Windows hide the first token then, which is told by exchanging it.
    """
    (limit,) = limits(tiny(name, **changes))
    assert limit.tokens == tokens and limit.otherwise
    model = plain_model(tiny(name, **changes))
    text = random_tokens(1, tokens + 1)

    def logits(count: int, first: int) -> torch.Tensor:
        changed = text[:, :count].clone()
        changed[0, 0] = first
        return model(input_ids=changed, use_cache=False).logits[0]

    if "sliding" in limit.reason:
        assert not torch.equal(logits(tokens, 5)[-1], logits(tokens, 6)[-1])
        one_layer = plain_model(tiny(name, num_hidden_layers=1, layer_types=None))
        beyond = [
            one_layer(input_ids=torch.cat([torch.tensor([[first]]), text[:, 1:]], 1), use_cache=False)
            for first in (5, 6)
        ]
        torch.testing.assert_close(beyond[0].logits[0, -1], beyond[1].logits[0, -1])
        return
    at, before, after = (logits(count, 5) for count in (tokens, tokens - 1, tokens + 1))
    torch.testing.assert_close(at[:-1], before, atol=1e-5, rtol=1e-5)
    assert (after[: tokens - 1] - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_learned_positions_end(name: str) -> None:
    (limit,) = limits(tiny(name))
    assert limit.tokens == 64 and not limit.otherwise and "learned positions" in limit.reason
    model = plain_model(tiny(name))
    model(input_ids=random_tokens(1, 64), use_cache=False)
    with pytest.raises(IndexError):
        model(input_ids=random_tokens(1, 65), use_cache=False)


@pytest.mark.parametrize(
    "config",
    [
        tiny("llama"),
        tiny("llama", rope_parameters=YARN),
        tiny("mistral", sliding_window=None),
        tiny("gemma3_text", layer_types=["full_attention"] * 2),
        tiny("qwen2", use_sliding_window=False, sliding_window=8),
        tiny("mixtral"),
    ],
    ids=lambda config: config.model_type,
)
def test_other_models_have_no_limit(config: PretrainedConfig) -> None:
    assert limits(config) == []


def test_a_loaded_model_has_the_limits_of_its_config() -> None:
    config = tiny("gemma3_text", rope_parameters={"full_attention": DYNAMIC, "sliding_attention": DEFAULT})
    model = our_model(config)
    assert limits_of_loaded(model) == limits(config) != []
    assert model.config._attn_implementation == ATTENTION


def test_lengths_that_are_asked_for() -> None:
    """Contexts of 64 and 16 new tokens, γ up to 4, sequences of 96."""
    assert longest_text(tiny_config()) == 96
    assert longest_text(tiny_config({"data.max_new_tokens": 40})) == 64 + 40 + 4
    assert longest_text(tiny_config({"data.max_new_tokens": 40, "sweep.gammas": [2, 9]})) == 64 + 40 + 9
    gate = {"gammas": [2], "least_documents": 5}
    improving = {"improve": {"gamma": 7, "kl_steps": 0, "gate": gate}, "data.validation_prompts": 6}
    assert longest_text(tiny_config(improving)) == 96 + 7, "what is served is as long as a sequence"


def test_what_is_told_of_a_limit() -> None:
    window, table = limits(tiny("mistral")), limits(tiny("gpt2"))
    assert problem_of_length(window, "mistral", 40) is None
    told = problem_of_length(window, "mistral", 41)
    assert (
        told
        and "mistral attends within a sliding window of 40 tokens, and texts get 41 tokens long: lower"
        in told
    )
    told = problem_of_length(window, "mistral", None)
    assert told and "how long texts get is not said: name that length (`max_tokens` of load_pair" in told
    # A table that ends is not read wrongly without an error: an unknown length is no reason to refuse it.
    assert problem_of_length(table, "gpt2", None) is None
    told = problem_of_length(table, "gpt2", 65)
    assert told and "gpt2 has 64 learned positions and no more" in told and "rope_scaling" not in told
