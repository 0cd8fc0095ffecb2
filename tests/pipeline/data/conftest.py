"""Small sources of every kind, in the hub's schemas, and a tokenizer trained on a few sentences."""

from __future__ import annotations

import pytest

from pipeline.data.tokenizer import train_bpe
from tests.helpers.documents import story


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe([story(1), story(2)], 400)
