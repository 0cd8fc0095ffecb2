"""An engine that writes texts to learn from: what a config may ask of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.tiny import tiny_config

SERVER = {"labels.server": {"url": "http://127.0.0.1:8000"}}
ASKING = {
    "data.sources": [
        {
            "kind": "text",
            "name": "code",
            "files": ["stdlib"],
            "ask": "What is this? {text}",
            "training_prompts": {40: 4},
        }
    ]
}


def test_without_one_a_config_is_as_it_was() -> None:
    assert "server" not in tiny_config().model_dump(mode="json")["labels"]


@pytest.mark.parametrize(
    "written", [ASKING, {"labels.on_policy_fraction": 1, "labels.on_policy_temperature": 0}]
)
def test_it_writes_answers_and_on_policy_texts(written: dict[str, Any]) -> None:
    server = tiny_config(SERVER | written).labels.server
    assert server and (server.model, server.least_agreement) == (None, 0.98)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (SERVER, "labels.server has nothing to write"),
        (
            SERVER | ASKING | {"labels.answers": {"temperature": 0.7}},
            r"answers.temperature \(0.7\) must be 0 with labels.server: only of greedy text",
        ),
        (SERVER | {"labels.on_policy_fraction": 0.5}, r"on_policy_temperature \(1\) must be 0"),
        (ASKING | {"labels.server": {"url": "127.0.0.1:8000"}}, "labels.server.url"),
        (ASKING | {"labels.server": {"url": "http://me:secret@host:8000"}}, "labels.server.url"),
        (ASKING | {"labels.server": {"url": "http://host", "least_agreement": 0}}, "least_agreement"),
    ],
)
def test_what_it_cannot_do_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(changes)
