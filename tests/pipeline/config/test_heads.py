"""What of a config is for heads or some views alone, and what leaves a head nothing to do."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.schema import Config
from tests.helpers.tiny import tiny_config

HEAD: dict[str, Any] = {"drafter": {"kind": "head", "feature_layers": [1, 2]}, "target.layers": 3}
WINDOW = {"name": "v", "policy": "window", "budgets": {16: 1}}


def test_defaults_are_as_if_the_fields_had_not_been_added() -> None:
    dumped = tiny_config().model_dump(mode="json")
    assert "features" not in dumped["labels"] and "answers" not in dumped["labels"]
    assert not {"chain_steps", "chain_decay"} & dumped["train"].keys()
    assert "sinks" not in dumped["sweep"]
    assert not {"sinks", "positions", "served_tokens", "path"} & dumped["train"]["variants"][0].keys()
    assert not {"ask", "training_prompts", "chat_template"} & dumped["data"]["sources"][0].keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels.features": "stored"}, "labels.features is for drafter.kind: head"),
        ({"train.chain_steps": 3}, "train.chain_steps is for drafter.kind: head"),
        (
            HEAD | {"drafter": {"kind": "head", "feature_layers": [1, 9]}},
            r"feature_layers: \[1, 9\] goes beyond",
        ),
        (HEAD | {"drafter": {"kind": "head"}}, "at least 5 layers, or feature_layers"),
        (HEAD | {"train.chain_steps": 16}, r"window_tokens \(16\) must be more than train.chain_steps"),
        (HEAD | {"sweep.sinks": 16, "sweep.policies": ["window"]}, r"sweep.sinks \(16\) leaves nothing"),
        (
            HEAD | {"train.variants": [WINDOW | {"sinks": 20}]},
            r"v.sinks \(20\) leaves nothing of a window of 16",
        ),
        (HEAD | {"sweep.sinks": 4}, r"sweep.sinks \(4\) goes with the policy window"),
        (
            HEAD
            | {
                "train.variants": [WINDOW | {"budgets": {32: 1}, "sinks": 20}],
                "train.validation_budgets": [16],
            },
            r"v.sinks \(20\) leaves nothing of a window of 16",
        ),
        (
            {"train.variants": [WINDOW | {"positions": "rebased"}]},
            "positions: rebased is for views that keep their entries, and a window rolls",
        ),
        (
            {"train.variants": [{"name": "v", "budgets": {16: 1}, "positions": "anchor_offset"}]},
            "served_tokens goes with positions: anchor_offset",
        ),
        (
            {"train.variants": [WINDOW | {"positions": "anchor_offset", "served_tokens": 500}]},
            "positions: anchor_offset moves sinks, and this window has none: set sinks",
        ),
        (
            {"train.variants": [{"name": "v", "budgets": {16: 1}, "served_tokens": 500}]},
            "served_tokens goes with positions: anchor_offset",
        ),
        (
            {
                "train.variants": [
                    {"name": "v", "budgets": {16: 1}, "positions": "anchor_offset", "served_tokens": 20}
                ]
            },
            r"train.variants.v.served_tokens \(20\) is less than data.sequence_tokens \(96\)",
        ),
        ({"labels.answers": {"per_prompt": 2, "temperature": 1.0}}, "labels.answers: no source"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(changes)


def test_a_head_may_be_behind_windows() -> None:
    config = tiny_config(
        HEAD
        | {
            "train.variants": [WINDOW | {"sinks": 4}],
            "sweep.policies": ["window", "streaming"],
            "sweep.sinks": 4,
        }
    )
    assert isinstance(config, Config) and config.train.variants[0].sinks == 4
