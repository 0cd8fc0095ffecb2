"""What models attend with, asked without weights, against what their configs say."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.models.probe import PROBE, probe
from tests.helpers.zoo import our_model, tiny


def asked(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=PROBE, experts_implementation=PROBE
        ).eval()


def test_calls_are_those_of_the_layers() -> None:
    calls, error = probe(asked(tiny("llama", num_hidden_layers=3, head_dim=16)))
    assert error is None
    assert [call.layer for call in calls] == [0, 1, 2]
    assert {call.key for call in calls} == {call.value for call in calls} == {(1, 2, 2, 16)}
    assert {(call.window, call.causal, call.others) for call in calls} == {(None, True, ())}


def test_windows_are_those_of_the_layer_types() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    calls, _ = probe(asked(tiny("gemma3_text", num_hidden_layers=3, layer_types=types)))
    assert [call.window for call in calls] == [40, None, 40]


@pytest.mark.parametrize(
    ("name", "part"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("doge", "a mask of its own")]
)
def test_what_is_given_beside_keys_and_values(name: str, part: str) -> None:
    calls, _ = probe(asked(tiny(name)))
    assert calls and all(part in " ".join(call.others) for call in calls)


def test_experts_need_no_weights() -> None:
    calls, error = probe(asked(tiny("mixtral")))
    assert error is None and [call.layer for call in calls] == [0, 1]


def test_an_encoder_looks_ahead() -> None:
    calls, _ = probe(asked(tiny("bert")))
    assert calls and not any(call.causal for call in calls)


def test_what_ends_the_pass_is_told() -> None:
    calls, error = probe(asked(tiny("jamba")))
    assert not calls and "remember more than keys and values" in str(error)


def test_a_model_with_weights_answers_as_well() -> None:
    config = tiny("mistral")
    model = our_model(config)
    model.set_attn_implementation(PROBE)
    assert probe(model) == probe(asked(config))
