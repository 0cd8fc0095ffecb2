"""Which models can be run, by the words for those that cannot; and what a loaded model is tried for."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from pipeline.kv.attention import causal_attention
from pipeline.kv.view_cache import ATTENTION, attend
from pipeline.models.support import differ, problem_of, problem_of_loaded
from tests.helpers.zoo import our_model, tiny

MUSIC = {part: {"model_type": kind} for part, kind in
         (("text_encoder", "t5"), ("audio_encoder", "encodec"), ("decoder", "musicgen_decoder"))}  # fmt: skip
INTERFACE = "does not attend through transformers' attention interface"
OTHER = "take a model of another architecture"
# Architecture, its changes, and parts of what is told.
REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("falcon", {}, [INTERFACE, OTHER]),
    ("bloom", {}, [INTERFACE, OTHER]),
    ("mamba", {}, [INTERFACE, OTHER]),
    ("jamba", {}, ["its layers remember more than keys and values", OTHER]),
    ("deepseek_v3", {}, ["heads of several shapes", "4 of 8 channels and 4 of 16 channels", OTHER]),
    ("gpt_oss", {}, ["attention sinks (s_aux)", OTHER]),
    ("gemma2", {}, ["a cap on attention scores (softcap)", OTHER]),
    ("stablelm", {}, ["its layers do not hand keywords on to their attention", OTHER]),
    ("bert", {}, ["attends to tokens that come later"]),
    ("bart", {}, ["counts positions itself"]),
    ("diffllama", {}, ["attends 4 times in 2 layers"]),
    ("llama4_text", {"head_dim": 12, "num_local_experts": 2}, ["cannot be told from its head"]),
    ("llava", {}, ["reads more than text"]),
    ("gemma3", {}, ["reads more than text"]),
    ("musicgen", MUSIC, ["reads more than text"]),
    ("t5", {}, ["is no causal language model"]),
    ("mistral", {}, ["a sliding window of 40 tokens", "texts get 60 tokens long", "lower data.contexts"]),
    ("gemma3_text", {}, ["a sliding window of 40 tokens", "lower data.contexts"]),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
               "max_position_embeddings": 50}, ["rope_type dynamic", "over 50 tokens", "such as yarn"]),
    ("gpt2", {"max_position_embeddings": 50}, ["50 learned positions", "tokens and data.contexts"]),
]  # fmt: skip
COMPOSITE = ("llava", "gemma3", "t5", "musicgen")


def config_of(name: str, changes: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(name, **changes) if name in COMPOSITE else tiny(name, **changes)


@pytest.mark.parametrize(("name", "changes", "parts"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_cannot_be_run_is_told_by_kind(name: str, changes: dict[str, Any], parts: list[str]) -> None:
    problem = problem_of(config_of(name, changes), reach=60)
    assert problem and problem.startswith(name)
    assert all(part in problem for part in parts), problem
    assert len(problem) < 400


FINE: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("llama", "qwen2", "qwen3", "olmo2", "phi", "phi3", "glm", "persimmon")),
    *((name, {}) for name in ("granite", "cohere", "gpt2", "gpt_neox", "opt", "mixtral", "qwen2_moe")),
    ("mistral", {"sliding_window": 60}),
    ("gemma3_text", {"sliding_window": 60}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
]


@pytest.mark.parametrize(("name", "changes"), FINE, ids=[name for name, _ in FINE])
def test_what_can_be_run(name: str, changes: dict[str, Any]) -> None:
    config = tiny(name, **changes)
    before = copy.deepcopy(config)
    assert problem_of(config, reach=60) is None
    # The model is loaded with this config: nothing of the question may stay in it.
    for field in ("_attn_implementation", "_experts_implementation"):
        assert getattr(config, field) == getattr(before, field)
    assert config.to_dict() == before.to_dict()


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes"])
def test_quantised_weights_are_named(method: str) -> None:
    for given in ({"quant_method": method}, SimpleNamespace(quant_method=method)):
        config = tiny("llama")
        config.quantization_config = given
        problem = problem_of(config, reach=60)
        assert (
            problem and f"its weights are quantised ({method})" in problem and "float32, bfloat16" in problem
        )


def test_an_unknown_length_is_told_where_it_matters() -> None:
    assert problem_of(tiny("llama"), reach=None) is problem_of(tiny("gpt2"), reach=None) is None
    problem = problem_of(tiny("mistral"), reach=None)
    assert problem and "how long texts get is not said" in problem


# ── with weights ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "granite", "mixtral", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_says_what_it_says_itself(name: str, dtype: torch.dtype) -> None:
    model = our_model(tiny(name)).to(dtype)
    assert problem_of_loaded(model) is None
    assert model.config._attn_implementation == ATTENTION


def test_a_layer_that_attends_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As code of a model's own may: under its own attention a layer adds what ours is not told."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward

    def biased(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        distances = torch.arange(key.shape[2]) - key.shape[2]
        mask = (0 if mask is None else mask) + 0.2 * distances  # as ALiBi
        return own(module, query, key, value, mask, **kwargs)

    model = our_model(tiny("llama"))
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", biased)
    problem = problem_of_loaded(model)
    assert problem == "llama says something else behind a full view than by its own attention"


def test_a_head_before_which_something_is_done_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits from all that the layers return cannot be made again from the last layer's states."""
    model = our_model(tiny("llama"))
    forward = type(model).forward

    def noisy(self: Any, **kwargs: Any) -> Any:
        output = forward(self, **kwargs)
        if "input_ids" in kwargs:
            output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(type(model), "forward", noisy)
    assert problem_of_loaded(model) == "llama: its logits do not follow from the states of its last layer"


def test_a_layer_without_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_model(tiny("llama"))
    monkeypatch.setattr(
        model.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None)
    )
    assert problem_of_loaded(model) == "llama: 1 of its 2 layers attend"


def test_what_a_model_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = our_model(tiny("llama"))

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("unexpected keyword argument 'view_cache'")

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", fail)
    problem = problem_of_loaded(model)
    assert problem and problem.endswith("unexpected keyword argument 'view_cache'")

    def lose(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lose)
    with pytest.raises(torch.OutOfMemoryError):
        problem_of_loaded(model)


def test_weights_that_are_not_finite_are_found_elsewhere() -> None:
    model = our_model(tiny("llama"))
    model.lm_head.weight.data[3] = torch.nan
    assert problem_of_loaded(model) is None
    assert not differ(torch.tensor([torch.inf]), torch.tensor([1.0]))


# ── the attention function itself ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sliding_window": 16}, "a sliding window"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "a padding mask"),
    ],
)
def test_attention_that_is_more_than_a_product_is_no_product(given: dict[str, Any], words: str) -> None:
    query, key, value = torch.randn(3, 1, 2, 3, 4)
    call: dict[str, Any] = {"attention_mask": None, "scaling": 0.5, **given}
    with pytest.raises(ValueError, match=words):
        attend(torch.nn.Identity(), query, key, value, **call)
    output, _ = attend(torch.nn.Identity(), query, key, value, None, 0.5, softcap=None)
    torch.testing.assert_close(output.transpose(1, 2), causal_attention(query, key, value, 0.5))
