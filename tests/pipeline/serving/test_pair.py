"""Prompts and pairs of programs: read as the sweep reads them, with tokenizers as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import BadData
from pipeline.serving.pair import Pair, load_pair
from tests.helpers.documents import request_for, write_lines
from tests.helpers.sources import read, reader_of
from tests.helpers.tiny import SPECIALS, VOCABULARY, save_model

PROMPT = " ".join(f"w{3 + 7 * k % 90}" for k in range(40))


@pytest.fixture
def folders(target: PreTrainedModel, drafter: PreTrainedModel, tmp_path: Path) -> Path:
    save_model(target, tmp_path / "target")
    save_model(drafter, tmp_path / "drafter")
    return tmp_path


def give(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a model's folder hold another tokenizer."""
    for file in folder.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(folder)


def load(folders: Path) -> Pair:
    return load_pair(folders / "target", folders / "drafter", device="cpu")


def plain(folder: Path, tokens: list[int], count: int) -> list[int]:
    """The greedy continuation by transformers; it ends with EOS where that comes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = torch.tensor([tokens])
    output = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
    )
    return output[0, len(tokens) :].tolist()


def test_a_prompt_is_that_of_the_sweep_without_an_eos_behind_it(folders: Path):
    """A tokenizer that was saved with add_eos_token; texts with and without special tokens of their own."""
    tokenizer = AutoTokenizer.from_pretrained(folders / "drafter")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", SPECIALS["<s>"]), ("</s>", SPECIALS["</s>"])]
    )
    give(folders / "drafter", tokenizer)
    pair, texts = load(folders), ["w5 w6", "<s> w5 w6", "<s> w5 </s> w6"]
    write_lines(folders / "p.jsonl", [{"prompt": text} for text in texts])
    reader = reader_of(folders, kind="prompts", files=["p.jsonl"])
    swept = reader.prompts(
        read(reader)[0], request_for(AutoTokenizer.from_pretrained(folders / "drafter"), 64)
    )
    assert [prompt.tokens for prompt in swept] == [[1, 5, 6], [1, 5, 6], [1, 5, 2, 6]]
    assert [pair.prompt(0, text, 8).tokens for text in texts] == [prompt.tokens for prompt in swept]


def test_a_pad_token_behind_the_embeddings_changes_nothing(folders: Path):
    before = load(folders).continue_prompts([PROMPT], "streaming", 16, 3, 12)
    tokenizer = AutoTokenizer.from_pretrained(folders / "drafter")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert len(tokenizer) == VOCABULARY + 1
    give(folders / "drafter", tokenizer)
    pair = load(folders)
    assert pair.target.num_tokens == pair.drafter.num_tokens == VOCABULARY
    assert pair.continue_prompts([PROMPT], "streaming", 16, 3, 12) == before
    expected = plain(folders / "target", tokenizer(PROMPT)["input_ids"], 12)
    assert before == [tokenizer.decode(expected, skip_special_tokens=True)]
    with pytest.raises(BadData, match=r"the prompt holds '\[PAD\]', which the models have no embedding for"):
        pair.prompt(0, "w5 [PAD] w6", 8)
    tokenizer.add_tokens(["<image>"])
    give(folders / "drafter", tokenizer)
    with pytest.raises(
        BadData, match="has 97 logits, and none for 1 of the tokenizer's tokens, such as <image>"
    ):
        load(folders)


def test_the_targets_eos_ends_texts_whatever_the_drafters_is(folders: Path):
    """The drafter's is a token that comes up in the text."""
    written = load(folders).continue_prompts([PROMPT], "streaming", 16, 3, 12)
    tokenizer = AutoTokenizer.from_pretrained(folders / "drafter")
    tokenizer.eos_token = "<pad>"
    give(folders / "drafter", tokenizer)
    for name in ("config.json", "generation_config.json"):
        file = folders / "drafter" / name
        values = json.loads(file.read_text()) | {"eos_token_id": tokenizer(written[0])["input_ids"][2]}
        file.write_text(json.dumps(values))
    pair = load(folders)
    assert pair.eos == {SPECIALS["</s>"]}
    assert pair.continue_prompts([PROMPT], "streaming", 16, 3, 12) == written


def test_an_empty_prompt_is_told(folders: Path):
    with pytest.raises(BadData, match="the prompt is empty"):
        load(folders).prompt(0, "", 8)
