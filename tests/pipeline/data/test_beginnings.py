"""How texts begin: sequences and prompts, against the tokenizers' own calls."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.data.documents import Part
from pipeline.data.packing import encode_part, pack, plan_packing
from pipeline.data.prompts import continuation_prompts
from pipeline.data.tokenizer import beginning, encode, encode_prompt
from pipeline.store.files import write_rows
from tests.helpers.documents import document, request_for, story

TURN = "user Say hi assistant"
# A tokenizer's own frame around a text, and its BOS, which it may have and leave out.
FRAMES = {
    "BOS": ("<s> $A", "<s>"),
    "BOS and EOS": ("<s> $A </s>", "<s>"),
    "EOS": ("$A </s>", "<s>"),
    "BOS left out": (None, "<s>"),
    "BOS and EOS are one": (None, "</s>"),
    "no BOS": (None, None),
    "two tokens": ("<pad> <s> $A", None),
    "others": ("<pad> $A </s>", "<s>"),
}


def framed(name: str, marked: bool = False):
    """A tokenizer with one of the frames; `marked`: of words that begin with ▁, as sentencepiece has them."""
    frame, bos = FRAMES[name]
    base = Tokenizer(models.BPE())
    split = pre_tokenizers.Metaspace() if marked else pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.pre_tokenizer = split
    base.decoder = decoders.Metaspace() if marked else decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    base.train_from_iterator([story(1), story(2), TURN], trainer)
    if frame:
        ids = [(token, base.token_to_id(token)) for token in ("<s>", "</s>", "<pad>")]
        base.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=base, bos_token=bos, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("marked", [False, True], ids=["bytes", "words"])
@pytest.mark.parametrize("name", FRAMES)
def test_a_prompt_is_read_as_the_tokenizer_itself_reads_it(name: str, marked: bool):
    """But without an EOS behind it: the tokenizer's own call is the oracle."""
    made, text = framed(name, marked=marked), story(3)
    own = made(text)["input_ids"]
    ours = encode_prompt(made, text)
    assert ours == (own[:-1] if "</s>" in (FRAMES[name][0] or "") else own)
    assert made.eos_token_id != ours[-1] and ours[len(beginning(made)) :] == encode(made, text)


@pytest.mark.parametrize("name", FRAMES)
def test_a_rendered_prompt_has_its_beginning_once_and_its_special_tokens(name: str):
    made = framed(name)
    begins = "".join(made.convert_ids_to_tokens(beginning(made)))
    rendered = f"{begins}{TURN}</s>{TURN}"
    tokens = made(rendered, add_special_tokens=False)["input_ids"]
    assert encode_prompt(made, rendered) == tokens
    assert encode_prompt(made, rendered.removeprefix(begins)) == tokens
    assert tokens.count(made.eos_token_id) == 1 and made.decode(tokens) == rendered


@pytest.mark.parametrize("name", FRAMES)
def test_sequences_and_prompts_begin_as_texts_do(name: str, tmp_path):
    made, begins = framed(name), len(beginning(framed(name)))
    (prompt,) = continuation_prompts([document(1)], request_for(made, 64, count=1))
    made.save_pretrained(tmp_path / "tokenizer")
    write_rows(tmp_path / "documents" / "a.jsonl", [document(1)])
    part = encode_part(tmp_path, 50, (Part(file="a.jsonl", source="s", split="train", documents=[]), set()))
    (plan,) = plan_packing([part], 10**9)
    pack(tmp_path, plan)
    sequences = np.load(tmp_path / "sequences" / "train-00000.npy")
    text = encode(made, document(1).text)
    assert len(prompt.tokens) == 64 and sequences.shape[1] == 50
    own = made(document(1).text)["input_ids"]
    assert prompt.tokens[:begins] == own[:begins] and all(
        row[:begins] == own[:begins] for row in sequences.tolist()
    )
    assert sequences[0, begins:].tolist() == text[: 50 - begins]
    assert text[: 64 - begins] != prompt.tokens[begins:] and set(prompt.tokens[begins:]) <= set(text)


def test_a_new_tokenizer_takes_special_tokens_for_text_in_prompts_too(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<s>Hi</s><pad>"
    assert (
        encode_prompt(loaded, text)
        == [loaded.bos_token_id, *encode(loaded, text)]
        == loaded(text)["input_ids"]
    )
