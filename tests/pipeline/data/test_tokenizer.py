"""Shared and new tokenizers."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import LlamaConfig

from pipeline.data.tokenizer import check_tokenizers, encode, encode_with_offsets, must_match, train_bpe
from pipeline.errors import BadData
from pipeline.models.load import ModelRef, shared_tokens
from tests.helpers.documents import story
from tests.helpers.tiny import tiny_config


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


def words(ids: dict[str, int], **special: str):
    """A tokenizer of whole words, by their ids."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(ids)), **special)


def test_the_tokens_that_begin_and_end_texts_may_be_others():
    """The target's are the ones that count."""
    ids = {"<s>": 0, "</s>": 1, "<end>": 2, "a": 3}
    target = words(ids, bos_token="<s>", eos_token="</s>")
    for special in (
        {"eos_token": "<end>"},
        {"bos_token": "</s>"},
        {},
        {"unk_token": "a", "pad_token": "<s>"},
    ):
        must_match(target, words(ids, **special), "big", "small")


def test_a_pad_token_that_also_ends_texts_is_compared():
    target = words({"a": 0, "</s>": 1, "b": 2}, eos_token="</s>", pad_token="</s>")
    drafter = words({"a": 0, "b": 2, "</s>": 5}, eos_token="</s>", pad_token="</s>")
    with pytest.raises(BadData, match=r"1 tokens; '</s>' is 1 and 5"):
        must_match(target, drafter, "big", "small")


# ── logits for all of it ──────────────────────────────────────────────────────────────────────────


def with_tokens(tokenizer, folder, *more: str, **special: str):
    """A copy with tokens added behind the others, as `tokenizer.add_special_tokens` does."""
    other = saved(tokenizer, folder)
    other.add_special_tokens({"additional_special_tokens": list(more), **special})
    return other


def sized(folder, vocab_size: int) -> ModelRef:
    LlamaConfig(vocab_size=vocab_size).save_pretrained(folder)
    return ModelRef(str(folder), role=folder.name)


def test_a_pad_token_alone_may_lie_behind_the_embeddings(tokenizer, tmp_path):
    large, small = sized(tmp_path / "target", 448), sized(tmp_path / "drafter", 400)
    assert shared_tokens(tokenizer, large, small) == 400
    padded = with_tokens(tokenizer, tmp_path / "t", pad_token="[PAD]")
    assert len(padded) == 401
    assert shared_tokens(padded, large) == 401 and shared_tokens(padded, large, small) == 400


@pytest.mark.parametrize(
    ("more", "special", "said"),
    [
        (["<image>"], {}, "none for 1 of the tokenizer's tokens, such as <image>:"),
        (["<b>", "<a>"], {"pad_token": "[PAD]"}, "none for 2 of the tokenizer's tokens, such as .*<a>"),
        ([], {"pad_token": "[END]", "eos_token": "[END]"}, r"none for 1 .* such as \[END\]:"),
    ],
    ids=["another token", "among others", "a pad that ends texts"],
)  # fmt: skip
def test_another_token_without_a_logit_is_named(tokenizer, tmp_path, more, special, said):
    longer = with_tokens(tokenizer, tmp_path / "t", *more, **special)
    with pytest.raises(BadData, match=rf"the drafter '\S+' has 400 logits, and {said}"):
        shared_tokens(longer, sized(tmp_path / "target", 448), sized(tmp_path / "drafter", 400))


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_models_in_folders_are_asked_before_anything_is_read(tokenizer, tmp_path, role):
    """One whose config is elsewhere, such as on the hub, is asked when it is loaded."""
    for name in ("target", "drafter"):
        sized(tmp_path / name, 400 if name == role else 448)
        with_tokens(tokenizer, tmp_path / "t", "<image>").save_pretrained(tmp_path / name)
    models = {name: {"kind": "pretrained", "path": str(tmp_path / name)} for name in ("target", "drafter")}
    config = tiny_config({"data.tokenizer": {"kind": "target"}, **models})
    with pytest.raises(BadData, match=f"the {role} .*<image>.*embeddings for all of it"):
        check_tokenizers(config)
    (tmp_path / role / "config.json").unlink()
    check_tokenizers(config)


def test_a_pad_token_is_no_reason_to_refuse_a_pair(tokenizer, tmp_path):
    for name in ("target", "drafter"):
        sized(tmp_path / name, 400)
    with_tokens(tokenizer, tmp_path / "t", pad_token="[PAD]").save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "drafter")
    models = {name: {"kind": "pretrained", "path": str(tmp_path / name)} for name in ("target", "drafter")}
    check_tokenizers(tiny_config({"data.tokenizer": {"kind": "target"}, **models}))
