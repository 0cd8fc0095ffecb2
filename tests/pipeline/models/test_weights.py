"""Checkpoints that are not whole or fit another config: named before they are loaded, and when they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from pipeline.errors import BadData
from pipeline.models.load import ModelRef, load_model, read_config
from pipeline.models.weights import INDEX, WEIGHTS, check_weights, must_be_whole
from tests.helpers.models import random_tokens
from tests.helpers.old_checkpoints import State, old_gpt2, old_mixtral
from tests.helpers.tiny import VOCABULARY
from tests.helpers.zoo import plain_model, saved, tiny

Ways = Callable[[ModelRef], Any]


def check(ref: ModelRef) -> None:
    check_weights(ref, Path(ref.path), read_config(ref))


def problem(ref: ModelRef, way: Ways = check) -> str:
    """What is told of a checkpoint, the same by its headers and when it is loaded."""
    with pytest.raises(BadData) as caught:
        way(ref)
    assert ref.role in str(caught.value) and ref.path in str(caught.value)
    return str(caught.value)


def rewritten(ref: ModelRef, change: Callable[[State], State]) -> ModelRef:
    file = Path(ref.path) / WEIGHTS
    state = {name: value.contiguous() for name, value in change(load_file(file)).items()}
    save_file(state, file, {"format": "pt"})
    return ref


def edited(ref: ModelRef, **values: Any) -> ModelRef:
    file = Path(ref.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return ref


def sharded(config: PretrainedConfig, folder: Path) -> ModelRef:
    """In three files at least, as large models are."""
    ref = saved(config, folder, role="target")
    model = plain_model(config)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return ref


def without(part: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if part not in name}


LOADING: list[Ways] = [check, lambda ref: load_model(ref, VOCABULARY)]


@pytest.mark.parametrize("way", LOADING, ids=["headers", "loading"])
@pytest.mark.parametrize(
    ("name", "part", "count"),
    [("llama", "lm_head", 1), ("llama", "layers.1.", 9), ("gpt2", "mlp.c_fc.bias", 2)],
)
def test_weights_that_a_checkpoint_lacks(tmp_path: Path, name: str, part: str, count: int, way: Ways) -> None:
    config = tiny(name, tie_word_embeddings=name == "gpt2")
    ref = rewritten(saved(config, tmp_path / "model", role="target"), without(part))
    told = problem(ref, way)
    assert f"lacks {count} weights, such as" in told and part in told and "tie_word_embeddings" in told


def test_experts_that_a_checkpoint_lacks_show_when_it_is_loaded(tmp_path: Path) -> None:
    """By the names of an older release, which only loading brings to those of today."""
    ref = saved(tiny("mixtral"), tmp_path / "model", role="target")
    rewritten(ref, lambda state: without("layers.1.block_sparse_moe")(old_mixtral(state)))
    check(ref)
    assert "lacks 3 weights, such as model.layers.1.mlp." in problem(ref, LOADING[1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes", "change"),
    [
        ("llama", {"tie_word_embeddings": True}, without("lm_head")),
        ("gpt2", {"tie_word_embeddings": True}, old_gpt2),
        ("mixtral", {}, old_mixtral),
        ("opt", {}, lambda state: {key.removeprefix("model."): value for key, value in state.items()}),
        ("llama", {}, lambda state: state | {"rotary_emb.inv_freq": torch.ones(6)}),
    ],
    ids=["tied", "gpt2", "mixtral", "opt", "a buffer"],
)
def test_what_is_whole_is_loaded(
    tmp_path: Path, name: str, changes: dict[str, Any], change: Callable[[State], State]
) -> None:
    config = tiny(name, **changes)
    ref = rewritten(saved(config, tmp_path / "model"), change)
    check(ref)
    model, tokens = load_model(ref, VOCABULARY), random_tokens(2, 20)
    expected = plain_model(config)(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", LOADING, ids=["headers", "loading"])
def test_sizes_that_are_another_models(tmp_path: Path, way: Ways) -> None:
    ref = edited(saved(tiny("llama"), tmp_path / "model", role="target"), intermediate_size=128)
    told = problem(ref, way)
    assert "6 weights do not fit its config.json" in told
    assert "model.layers.0.mlp.gate_proj.weight, which is [64, 48] and should be [128, 48]" in told


@pytest.mark.parametrize("way", LOADING, ids=["headers", "loading"])
def test_a_file_that_was_cut_short(tmp_path: Path, way: Ways) -> None:
    whole = saved(tiny("llama"), tmp_path / "model", role="target")
    file = Path(whole.path) / WEIGHTS
    for size in (file.stat().st_size - 1, 100, 5, 0):
        with file.open("r+b") as opened:
            opened.truncate(size)
        told = problem(whole, way)
        assert "model.safetensors is not a whole safetensors file" in told and "fetch it again" in told


@pytest.mark.parametrize("way", LOADING, ids=["headers", "loading"])
def test_shards_that_are_not_there(tmp_path: Path, way: Ways) -> None:
    ref = sharded(tiny("llama"), tmp_path / "model")
    way(ref)
    first, *_, last = sorted(Path(ref.path).glob("*.safetensors"))
    last.unlink()
    assert f"lacks {last.name}, which its {INDEX} names" in problem(ref, way)
    last.write_bytes(first.read_bytes()[:-1])
    assert f"its {last.name} is not a whole safetensors file" in problem(ref, way)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "[" * 99_999]
)
def test_an_index_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    ref = sharded(tiny("llama"), tmp_path / "model")
    (Path(ref.path) / INDEX).write_text(text)
    assert f"its {INDEX} cannot be read" in problem(ref)


def test_one_file_is_enough_beside_an_old_index(tmp_path: Path) -> None:
    """transformers reads the file, too."""
    ref = saved(tiny("llama"), tmp_path / "model")
    (Path(ref.path) / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    check(ref)
    load_model(ref, VOCABULARY)


def test_other_formats_are_told_the_way_out(tmp_path: Path) -> None:
    ref = saved(tiny("llama"), tmp_path / "model", role="target")
    (Path(ref.path) / WEIGHTS).rename(tmp_path / "model" / "pytorch_model.bin")
    assert f"holds no {WEIGHTS}; convert a .bin checkpoint once with `budgetdraft convert" in problem(ref)


def test_tied_weights_are_not_missed() -> None:
    model = plain_model(tiny("llama", tie_word_embeddings=True))
    must_be_whole(model, ["lm_head.weight"], "it")
    with pytest.raises(BadData, match=r"it lacks 1 weights, such as model\.norm\.weight"):
        must_be_whole(model, ["lm_head.weight", "model.norm.weight"], "it")
