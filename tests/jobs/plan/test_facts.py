"""What a plan starts from, and what it refuses before it counts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from jobs.plan.facts import known
from pipeline.config.schema import Config
from pipeline.data.tokenizer import train_bpe
from pipeline.errors import BadData
from tests.helpers.documents import story
from tests.helpers.tiny import tiny_config


def config_of(root: Path, *more: str) -> Config:
    """Books of the hub for a pair in folders, whose tokenizer has some tokens more than the models."""
    tokenizer = train_bpe([story(1)], 350)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for role in ("target", "drafter"):
        LlamaConfig(vocab_size=350, **shape).save_pretrained(root / role)
        tokenizer.save_pretrained(root / role)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": list(more)})
    tokenizer.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "drafter")
    models = {role: {"kind": "pretrained", "path": str(root / role)} for role in ("target", "drafter")}
    books = {"kind": "pg19", "name": "books"}
    return tiny_config({"data.sources": [books], "data.tokenizer": {"kind": "target"}, **models})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)


def test_a_token_without_a_logit_is_told_though_the_data_are_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"the target '\S+' has 350 logits, and none for .* <image>"):
        known(config_of(tmp_path, "<image>"))


def test_a_pad_token_alone_is_no_reason_to_refuse_a_plan(tmp_path: Path) -> None:
    shapes, facts = known(config_of(tmp_path))
    assert shapes["target"].vocab == facts.vocab == 350 and facts.how.startswith("assumed")
