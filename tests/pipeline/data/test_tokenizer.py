"""Shared and new tokenizers."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken

from pipeline.data.tokenizer import encode, encode_with_offsets, must_match, train_bpe
from pipeline.errors import BadData
from tests.helpers.documents import story


def saved(tokenizer, path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def test_any_text_comes_back_exactly(tokenizer, tmp_path):
    loaded = saved(tokenizer, tmp_path)
    draw = random.Random(0)
    points = [p for p in range(0x11000) if not 0xD800 <= p < 0xE000]
    texts = ["", " ", "a  b , don't .", "\r\n\t\x00", "</s><s><pad> <s>", "naïve 🎉 日本", story(9)]
    texts += ["".join(map(chr, draw.sample(points, 200))) for _ in range(20)]
    for text in texts:
        for ids in (loaded.encode(text), encode(loaded, text)):
            assert loaded.decode(ids, skip_special_tokens=True) == text
        assert loaded.encode(text)[0] == loaded.bos_token_id == 0
        assert not {0, 1, 2} & set(encode(loaded, text))


def test_the_size_is_the_one_asked_for(tokenizer):
    assert len(tokenizer) == 400
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_offsets_cover_the_text(tokenizer):
    text = story(3)
    tokens, starts, ends = encode_with_offsets(tokenizer, text)
    assert tokens == encode(tokenizer, text)
    assert "".join(text[a:b] for a, b in zip(starts, ends, strict=True)) == text


def test_a_drafter_with_a_pad_token_of_its_own_matches(tokenizer, tmp_path):
    other = saved(tokenizer, tmp_path)
    other.pad_token = AddedToken("[PAD]", special=True)
    other.add_special_tokens({"pad_token": "[PAD]"})
    must_match(tokenizer, other, "target", "drafter")


def test_another_vocabulary_is_refused_by_name(tokenizer):
    other = train_bpe([story(5).upper()], 380)
    with pytest.raises(BadData, match=r"target 'big' and drafter 'small' differ .*must share"):
        must_match(tokenizer, other, "big", "small")


def test_other_special_ids_are_refused(tokenizer, tmp_path):
    other = saved(tokenizer, tmp_path)
    other.eos_token = "<pad>"
    with pytest.raises(BadData, match="eos_token_id is 1 and 2"):
        must_match(tokenizer, other, "big", "small")
