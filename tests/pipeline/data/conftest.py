"""Small sources of every kind, in the hub's schemas, and a tokenizer trained on a few sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.data.tokenizer import train_bpe
from tests.helpers.documents import story


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe([story(1), story(2)], 400)


@pytest.fixture(scope="session")
def chat_tokenizer(
    tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PreTrainedTokenizerBase]:
    """Makes one to which the special tokens in a text are meant, with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)

    def make(template: str) -> PreTrainedTokenizerBase:
        made = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
        made.chat_template = template
        return made

    return make
