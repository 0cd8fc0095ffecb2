"""Pickled checkpoints of several ages and programs, against the models that they were written from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from pipeline.errors import BadData
from pipeline.models.convert import convert
from pipeline.models.load import ModelRef, load_model
from tests.helpers.models import random_tokens
from tests.helpers.old_checkpoints import State, old_gpt2, old_mixtral, old_neox, old_opt
from tests.helpers.tiny import VOCABULARY
from tests.helpers.zoo import plain_model, saved, tiny

TOKENS = random_tokens(2, 30)


def pickled(folder: Path, config: PretrainedConfig, change: Callable[[State], Any] = lambda s: s) -> Path:
    """A checkpoint of random weights as another program has written it."""
    saved(config, folder)
    (folder / "model.safetensors").unlink()
    state = {name: value.clone() for name, value in plain_model(config).state_dict().items()}
    torch.save(change(state), folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(TOKENS).logits


@torch.no_grad()
def assert_converted(source: Path, config: PretrainedConfig, output: Path) -> None:
    convert(source, output)
    expected = plain_model(config)(input_ids=TOKENS).logits
    torch.testing.assert_close(logits(output), expected, atol=1e-5, rtol=1e-5)
    assert not list(output.glob("*.bin*")) and (output / "tokenizer.json").exists()
    assert not list(output.parent.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", old_gpt2),
        ("gpt_neox", old_neox),
        ("opt", old_opt),
        ("mixtral", old_mixtral),
        ("llama", lambda state: {"state_dict": state}),
        ("llama", lambda state: {"epoch": 3, "model": {"module": state}}),
    ],
    ids=["gpt2", "gpt_neox", "opt", "mixtral", "state_dict", "nested"],
)
def test_checkpoints_of_older_releases_and_other_programs(
    tmp_path: Path, name: str, change: Callable[[State], Any]
) -> None:
    # Those without a head share it with the embedding.
    config = tiny(name, tie_word_embeddings=name in ("gpt2", "opt"))
    assert_converted(pickled(tmp_path / "old", config, change), config, tmp_path / "new")


def test_tied_weights_may_be_absent(tmp_path: Path) -> None:
    config = tiny("llama", tie_word_embeddings=True)

    def change(state: State) -> State:
        del state["lm_head.weight"]
        return state

    assert_converted(pickled(tmp_path / "old", config, change), config, tmp_path / "new")


def test_what_ends_a_text_is_kept(tmp_path: Path) -> None:
    """A generation_config is the checkpoint's, not what its config.json would make of one."""
    source = pickled(tmp_path / "old", tiny("llama"))
    settings = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "new")
    kept = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert {name: kept[name] for name in settings} == settings


def test_masks_do_not_say_in_which_precision_weights_are(tmp_path: Path) -> None:
    def change(state: State) -> State:
        halves = {name: value.half() for name, value in old_gpt2(state).items()}
        masks = {name: value for name, value in halves.items() if name.endswith(".attn.bias")}
        return {name: value.float() for name, value in masks.items()} | {
            name: value for name, value in halves.items() if name not in masks
        }

    convert(pickled(tmp_path / "old", tiny("gpt2", tie_word_embeddings=True), change), tmp_path / "new")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto").state_dict()
    assert {value.dtype for value in state.values()} == {torch.float16}


def lacking(state: State) -> State:
    del state["model.layers.1.mlp.up_proj.weight"]
    return state


def spared(state: State) -> State:
    return {name: value for name, value in state.items() if ".layers.1." not in name}


def foreign(state: State) -> State:
    return state | {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(48),
        "classifier.weight": torch.ones(2),
    }


def longer(state: State) -> State:
    state["model.norm.weight"] = torch.ones(64)
    return state


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lacking, ["lacks 1 weights, such as model.layers.1.mlp.up_proj.weight", "not whole"]),
        (spared, ["lacks 9 weights", "model.layers.1."]),
        (foreign, ["2 weights are unknown", "classifier.weight", "q_proj.bias"]),
        (longer, ["1 weights have other sizes", "model.norm.weight, which is [64] and should be [48]"]),
        (lambda state: {"optimizer": 3}, ["pytorch_model.bin is not a checkpoint of named tensors"]),
        (lambda state: list(state.values()), ["is not a checkpoint of named tensors"]),
    ],
    ids=["a weight", "a layer", "unknown", "sizes", "no tensors", "no names"],
)
def test_what_does_not_fit_its_config_is_named(
    tmp_path: Path, change: Callable[[State], Any], parts: list[str]
) -> None:
    source = pickled(tmp_path / "old", tiny("llama"), change)
    with pytest.raises(BadData) as caught:
        convert(source, tmp_path / "new")
    assert str(source) in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("data", [b"", b"no pickle at all" * 9, None], ids=["empty", "text", "torn"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, data: bytes | None) -> None:
    source = pickled(tmp_path / "old", tiny("llama"))
    file = source / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:3000] if data is None else data)
    with pytest.raises(BadData) as caught:
        convert(source, tmp_path / "new")
    told = str(caught.value)
    assert f"{file} is not a whole checkpoint of tensors" in told and "copy it again" in told
    assert "weights_only" not in told, "torch's text advises to run what the file holds"


def test_a_config_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", tiny("llama"))
    for values in ({"model_type": "unheard_of"}, {"model_type": "t5"}, {}):
        (source / "config.json").write_text(json.dumps(values))
        with pytest.raises(BadData, match=r"old': its config\.json cannot be used: "):
            convert(source, tmp_path / "new")


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pickled(tmp_path / "old", tiny("llama"))
    copies = []

    def fail(*args: Any) -> None:
        copies.append(sorted(path.name for path in (tmp_path / ".new.tmp").iterdir()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.models.convert.shutil.copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path / "new")
    assert "model.safetensors" in copies[0]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_bin_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", tiny("llama"))
    with pytest.raises(BadData, match=re.escape(f"budgetdraft convert {source} OUTPUT")):
        load_model(ModelRef(str(source)), VOCABULARY)


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", tiny("llama"))
    with pytest.raises(BadData, match="exists; name a new folder"):
        convert(source, source)
    assert (source / "pytorch_model.bin").exists()


def test_a_half_precision_checkpoint_stays_one(tmp_path: Path) -> None:
    halves: State = {}

    def change(state: State) -> State:
        halves.update((name, value.half()) for name, value in state.items())
        return halves

    convert(pickled(tmp_path / "old", tiny("llama"), change), tmp_path / "new")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto").state_dict()
    assert all(
        value.dtype == torch.float16 and torch.equal(value, halves[name]) for name, value in state.items()
    )


class Harmful:
    """Code that a pickle would run."""

    def __init__(self, function: Callable[..., Any], argument: str) -> None:
        self.code = function, (argument,)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.code


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.mkdir, "Trying to load unsupported GLOBAL posix.mkdir whose module posix is blocked"),
        (shutil.rmtree, "Unsupported global: GLOBAL shutil.rmtree was not an allowed global by default"),
    ],
)
def test_a_pickle_with_code_is_refused(tmp_path: Path, function: Callable[..., Any], named: str) -> None:
    folder = tmp_path / "touched"
    if function is shutil.rmtree:
        folder.mkdir()
    harmful = Harmful(function, str(folder))
    source = pickled(tmp_path / "old", tiny("llama"), lambda _: {"model.norm.weight": harmful})
    before = folder.exists()
    with pytest.raises(BadData, match=f"not a whole checkpoint of tensors: {re.escape(named)}"):
        convert(source, tmp_path / "new")
    assert folder.exists() == before and not (tmp_path / "new").exists()
