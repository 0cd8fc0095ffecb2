"""Rope parameters in a config: the same keys and values as transformers takes, and what the errors say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from transformers import LlamaConfig, modeling_rope_utils
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pipeline.config.files import load_config
from pipeline.config.models import PretrainedModel
from pipeline.config.rope import AnyRope, RopeScaling
from pipeline.errors import ConfigError
from tests.helpers.configs import MINIMAL

GROUPS = {
    get_args(group.model_fields["rope_type"].annotation)[0]: group for group in get_args(get_args(AnyRope)[0])
}
# Of every type the least that it needs, for a head of 8.
LEAST: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"short_factor": [1, 1.0, 1, 1], "long_factor": [2.0, 2, 2, 2]},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4},
}
MODEL = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64}  # which every model's config has
KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
SHAPE = dict(zip(KEYS, (32, 4, 2, 256), strict=True))
check: Callable[[Any], Any] = TypeAdapter(RopeScaling).validate_python


def transformers_say(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers' validation has against `parameters`, as warnings or as an error."""
    said: list[str] = []
    monkeypatch.setattr(modeling_rope_utils.logger, "warning", said.append)
    monkeypatch.setattr(modeling_rope_utils.logger, "warning_once", lambda text: None)
    config = LlamaConfig(**SHAPE)
    config.rope_parameters = MODEL | parameters
    if parameters["rope_type"] in ("default", "linear", "dynamic"):
        config.rope_parameters.pop("original_max_position_embeddings")
    try:
        config.validate_rope()
    except (KeyError, TypeError) as error:
        said.append(repr(error))
    return said


@pytest.mark.parametrize("rope_type", LEAST)
def test_keys_are_those_of_transformers(rope_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[set[str], set[str]]] = []

    def note(
        kind: str, given: set[str], required: set[str], optional_keys: Any = None, ignore_keys: Any = None
    ) -> None:
        asked.append((set(required), set(optional_keys or ())))

    monkeypatch.setattr(
        modeling_rope_utils.RotaryEmbeddingConfigMixin, "_check_received_keys", staticmethod(note)
    )
    transformers_say({"rope_type": rope_type, **LEAST[rope_type]}, monkeypatch)
    required, optional = asked[-1]
    fields = GROUPS[rope_type].model_fields
    assert fields.keys() == required | optional | {"partial_rotary_factor"}
    assert {name for name, field in fields.items() if field.is_required()} == required - MODEL.keys()
    assert {*required - MODEL.keys()} == {"rope_type", *LEAST[rope_type]}


def test_every_type_that_is_computed_is_known() -> None:
    # Of Gemma alone, by kind of layer, which one set of parameters for all layers cannot say.
    assert GROUPS.keys() == {"default", *modeling_rope_utils.ROPE_INIT_FUNCTIONS} - {"proportional"}
    assert GROUPS.keys() == LEAST.keys()


@pytest.mark.parametrize("rope_type", LEAST)
def test_the_least_is_enough_for_transformers(rope_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"rope_type": rope_type, **LEAST[rope_type]}
    assert check(parameters) == parameters and transformers_say(parameters, monkeypatch) == []
    given = {"rope_type": "default", "rope_theta": 10_000.0, **parameters}
    frequencies = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters=given)).inv_freq
    assert frequencies.shape == (4,) and bool(torch.isfinite(frequencies).all())


@pytest.mark.parametrize("rope_type", LEAST)
def test_without_one_of_the_least_transformers_refuses(
    rope_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for left_out in LEAST[rope_type]:
        parameters = {"rope_type": rope_type, **LEAST[rope_type]}
        del parameters[left_out]
        assert "Missing required keys" in transformers_say(parameters, monkeypatch)[-1]
        with pytest.raises(ValidationError, match=left_out):
            check(parameters)


WRONG = [
    ("linear", {"factor": 0.5}),
    ("linear", {"factor": None}),
    ("linear", {"factor": "4"}),
    ("linear", {"beta_fast": 32}),
    ("dynamic", {"factor": 0}),
    ("yarn", {"attention_factor": -1.0}),
    ("yarn", {"beta_fast": "a"}),
    ("yarn", {"beta_slow": [1]}),
    ("yarn", {"beta_fast": 0.5}),
    ("yarn", {"beta_slow": 33.0}),
    ("yarn", {"beta_fast": 2, "beta_slow": 3}),
    ("yarn", {"low_freq_factor": 1}),
    ("longrope", {"short_factor": [1, "x", 1, 1]}),
    ("longrope", {"long_factor": "1234"}),
    ("longrope", {"factor": 0.5}),
    ("longrope", {"factor": "a"}),
    ("longrope", {"attention_factor": -1}),
    ("llama3", {"factor": 0.5}),
    ("llama3", {"low_freq_factor": "a"}),
    ("llama3", {"low_freq_factor": 4}),
    ("llama3", {"high_freq_factor": 0.5}),
    ("llama3", {"original_max_position_embeddings": 64.5}),
]  # fmt: skip


@pytest.mark.parametrize(("rope_type", "change"), WRONG)
def test_what_transformers_finds_wrong(
    rope_type: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"rope_type": rope_type, **LEAST[rope_type], **change}
    assert transformers_say(parameters, monkeypatch)
    with pytest.raises(ValidationError):
        check(parameters)


RIGHT = [
    ("yarn", {"attention_factor": None, "beta_fast": None, "beta_slow": None}),
    ("yarn", {"attention_factor": 1.1, "beta_fast": 16, "beta_slow": 16.0, "mscale": 1, "truncate": False}),
    ("yarn", {"rope_theta": 5e5, "original_max_position_embeddings": 32, "mscale_all_dim": 0.7}),
    ("longrope", {"factor": 4, "attention_factor": 1}),
    ("llama3", {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}),
]


@pytest.mark.parametrize(("rope_type", "change"), RIGHT)
def test_what_transformers_finds_right(
    rope_type: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"rope_type": rope_type, **LEAST[rope_type], **change}
    assert transformers_say(parameters, monkeypatch) == []
    assert repr(check(parameters)) == repr(parameters)  # integers stay integers, and nothing is filled in


def problem(tmp_path: Path, *overrides: str) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert len(str(caught.value).splitlines()) <= 40
    return str(caught.value)


ERRORS = [
    ("{rope_type: yarn, factr: 4}", ["{}.factr is no field", "mean factor?", "{}.factor is missing"]),
    ("{rope_type: llama3, factor: 4}", ["{}.low_freq_factor is missing", "{}.high_freq_factor is missing"]),
    ("{rope_type: linear, factor: 0.5}", ["{}.factor = 0.5", "a number, at least 1", "how many times"]),
    ("{rope_type: linear, factor: yes}", ["{}.factor = true", "YAML reads yes"]),
    ("{rope_type: yarn, factor: 2, low_freq_factor: 1}", ["{}.low_freq_factor is no", "rope_type llama3"]),
    ("{rope_type: linear, factor: 2, type: linear}", ["{}.type is no field", "mean rope_type?"]),
    ("{rope_type: linear, factor: 2, 3: 4}", ["{}.3 is no field"]),
    ("{rope_type: yran, factor: 2}", ['{}.rope_type = "yran"', "default, linear, dynamic, yarn"]),
    ("{type: yarn, factor: 2}", ["{}.rope_type is missing", "default, linear, dynamic, yarn"]),
    ("{rope_type: [yarn]}", ['{}.rope_type = ["yarn"]']),
    ("{rope_type: longrope, short_factor: [], long_factor: [x]}", ["{}.short_factor =", "{}.long_factor.0"]),
    ("{rope_type: yarn, factor: 2, beta_fast: 1, beta_slow: 2}", ["{}: beta_fast is 1"]),
    ("{rope_type: longrope, short_factor: [1], long_factor: [1]}", ["{}.short_factor has 1", "/ 2 is 4"]),
    ("{rope_type: default, partial_rotary_factor: 0.5}", ["{}.partial_rotary_factor is 0.5", "leave it out"]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "parts"), ERRORS)
@pytest.mark.parametrize("field", ["target.rope_scaling", "train.variants.multi_view.rope_scaling"])
def test_errors_name_field_and_remedy(tmp_path: Path, field: str, given: str, parts: list[str]) -> None:
    text = problem(tmp_path, f"{field}={given}")
    # What concerns a scratch model as a whole is told of it: `target: rope_scaling.short_factor has …`.
    text = text.replace("target: rope_scaling", "target.rope_scaling")
    assert all(part.format(field) in text for part in parts), text
    assert f"override {field}=" in text


def test_a_pretrained_drafter_has_a_shape_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"drafter": {"kind": "pretrained", "path": "x/y"}}))
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0],
        "long_factor": [1.0],
        "partial_rotary_factor": 0.5,
    }
    text = yaml.safe_dump(rope, default_flow_style=True, width=1000).strip()
    overrides = [f"train.variants.0.rope_scaling={text}", f"drafter.rope_scaling={text}"]
    config = load_config(path, overrides)
    assert isinstance(config.drafter, PretrainedModel)
    assert config.drafter.rope_scaling == config.train.variants[0].rope_scaling == rope
