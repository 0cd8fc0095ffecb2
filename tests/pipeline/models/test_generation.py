"""What a generation_config says, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from pipeline.models.generation import stop_tokens, warn_of_settings
from tests.helpers.models import VOCABULARY


@pytest.fixture
def model(make_model: Any, request: pytest.FixtureRequest) -> Any:
    """Under a name of its own, as what was said once of a model is not said again."""
    model = make_model()
    model.name_or_path = request.node.name
    return model


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Without what transformers says itself of such settings."""
    return [record.message for record in caplog.records if record.name.startswith("pipeline.")]


def test_stop_tokens_prefer_the_generation_config(model: Any) -> None:
    model.generation_config.eos_token_id = None
    assert stop_tokens(model) == {2}
    model.generation_config.eos_token_id = [5, 9]
    assert stop_tokens(model) == {5, 9}
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert stop_tokens(model) == frozenset()
    model.generation_config = None
    assert stop_tokens(model) == frozenset()


def test_ids_without_a_logit_end_no_text(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.generation_config.eos_token_id = [2, VOCABULARY - 1]
    assert stop_tokens(model) == {2, VOCABULARY - 1} and not said(caplog)
    model.generation_config.eos_token_id = [2, VOCABULARY, -1]
    assert stop_tokens(model) == stop_tokens(model) == {2}
    assert said(caplog) == [
        f"{model.name_or_path}: eos_token_id [-1, {VOCABULARY}] has no logit and ends no text"
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, None),
        ({"eos_token_id": [2, 5], "max_new_tokens": 9, "do_sample": False}, None),
        ({"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}, None),
        ({"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}, None),
        ({"temperature": 0.6, "top_p": 0.9}, None),  # which nobody samples with
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, "temperature 0.6, top_p 0.9"),
        ({"do_sample": True, "top_k": 20}, "top_k 20"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"repetition_penalty": 1.1, "do_sample": True, "top_k": 20}, "repetition_penalty 1.1, top_k 20"),
        ({"suppress_tokens": [3, 4], "num_beams": 2}, "suppress_tokens [3, 4], num_beams 2"),
    ],
)
def test_settings_that_are_not_heeded_are_told_once(
    model: Any, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], told: str | None
) -> None:
    model.generation_config = GenerationConfig(**settings)
    warn_of_settings(model)
    warn_of_settings(model)
    if told is None:
        assert not said(caplog)
        return
    (message,) = said(caplog)
    assert message.startswith(
        f"{model.name_or_path}: its generation_config asks for {told}, which is not done"
    )
    assert "at the config's temperatures" in message


def test_many_values_fit_a_line(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.generation_config = GenerationConfig(suppress_tokens=list(range(3, 90)))
    warn_of_settings(model)
    assert len(said(caplog)[0]) < 400


def test_a_model_without_settings(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    model.generation_config = None
    warn_of_settings(model)
    assert not said(caplog)
