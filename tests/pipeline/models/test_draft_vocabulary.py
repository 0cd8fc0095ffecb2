"""Drafters that can propose some tokens alone: their head, their files, their logits among all tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode.model import decode_model
from pipeline.decode.replay import view_logits
from pipeline.errors import BadData
from pipeline.kv.view_cache import read_prefix
from pipeline.models.draft_vocabulary import FILE, among_all, draft_tokens, most_frequent, restrict
from pipeline.models.export import export_model
from pipeline.models.load import ModelRef, load_model
from tests.helpers.models import random_tokens
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer
from tests.helpers.zoo import saved, tiny

TOKENS = random_tokens(2, 30)
CHOSEN = torch.tensor([2, 5, 6, 40, 41, 77, VOCABULARY - 1])


def exported(name: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """A model with a draft vocabulary, and its folder."""
    model = restrict(load_model(saved(tiny(name), folder / "start", reach=40), VOCABULARY), CHOSEN)
    export_model(model, tiny_tokenizer(), folder / "made")
    return model, folder / "made"


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "granite"])  # of which one multiplies its logits
def test_a_folder_is_a_plain_model_and_knows_its_tokens(tmp_path: Path, name: str) -> None:
    model, folder = exported(name, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "start", attn_implementation="eager").eval()
    whole = start(TOKENS).logits
    assert torch.equal(plain(TOKENS).logits, whole)
    again = load_model(ModelRef(str(folder), reach=40, proposes=True), VOCABULARY)
    assert (again.num_tokens, again.whole_tokens) == (len(CHOSEN), VOCABULARY)
    for ours in (model, again):
        torch.testing.assert_close(ours(TOKENS).logits, whole[..., CHOSEN], atol=1e-5, rtol=1e-5)
    assert json.loads((folder / FILE).read_text()) == {"tokens": CHOSEN.tolist(), "of": VOCABULARY}
    assert [path.name for path in folder.glob("*.safetensors")] == [
        "model.safetensors"
    ]  # engines load them all
    unasked = load_model(ModelRef(str(folder), reach=40), VOCABULARY)
    assert unasked.num_tokens == VOCABULARY and draft_tokens(unasked) is None


def test_it_goes_where_the_model_goes(tmp_path: Path) -> None:
    model, _ = exported("llama", tmp_path)
    assert draft_tokens(model.to("meta")).device.type == "meta"  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "granite"])
def test_decoding_and_replay_see_all_tokens(tmp_path: Path, name: str) -> None:
    """Both engines' logits are the whole model's at the chosen tokens, and nothing elsewhere."""
    _, folder = exported(name, tmp_path)
    model = load_model(ModelRef(str(folder), reach=40, proposes=True), VOCABULARY)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    whole = plain(TOKENS[:1]).logits[0]

    def assert_chosen(logits: Tensor, expected: Tensor) -> None:
        assert logits.shape == (*expected.shape[:-1], VOCABULARY) and torch.isfinite(logits).all()
        torch.testing.assert_close(logits[..., CHOSEN], expected[..., CHOSEN], atol=1e-4, rtol=1e-4)
        q, q_chosen = (logits / 0.3).softmax(-1), (expected[..., CHOSEN] / 0.3).softmax(-1)
        torch.testing.assert_close(q[..., CHOSEN], q_chosen, atol=1e-4, rtol=1e-3)
        outside = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, CHOSEN, False)
        assert (q[..., outside] == 0).all()

    fast = decode_model(model)
    assert fast.num_tokens == VOCABULARY
    _, after = fast.prefill(TOKENS[:1, :20], [(20, FULL)])
    assert_chosen(after[0], whole[19])
    (kept,), _ = read_prefix(model, TOKENS[:1, :20], [(20, FULL)])
    assert_chosen(view_logits(model, [kept], TOKENS[0, 20:].tolist())[0], whole[20:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_among_all_tokens(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 2, len(CHOSEN)).to(dtype)
    whole = among_all(logits, CHOSEN, VOCABULARY)
    assert torch.equal(whole[..., CHOSEN], logits) and whole.dtype == dtype
    assert torch.equal(CHOSEN[logits.argmax(-1)], whole.argmax(-1))
    assert among_all(logits, None, len(CHOSEN)) is logits


def test_gradients_reach_the_chosen_rows_alone(make_model: object) -> None:
    model = restrict(make_model(layers=1), CHOSEN)  # type: ignore[operator]
    hidden = torch.randn(4, 32)
    head = model.get_output_embeddings()
    (grad,) = torch.autograd.grad(head(hidden).square().sum(), head.weight)
    reached = grad.abs().sum(1).nonzero().squeeze(1)
    assert reached.tolist() == CHOSEN.tolist()
    assert torch.equal(head(hidden), hidden @ head.weight[CHOSEN].T)


def test_the_most_frequent_tokens_and_those_that_end_texts() -> None:
    rng = np.random.default_rng(0)
    seen = rng.zipf(1.4, 3000) % 60
    counts = np.bincount(seen, minlength=97)
    always = [90, 3]
    ranked = sorted(set(range(97)) - set(always), key=lambda token: (-Counter(seen.tolist())[token], token))
    for size in (2, 20, 70):  # 70: more than were seen
        expected = sorted([*always, *ranked[: size - 2]])
        assert most_frequent(counts, size, always).tolist() == expected
    for size in (1, 97, 200):
        with pytest.raises(BadData, match=f"train.draft_vocabulary: {size} must be less than the 97 tokens"):
            most_frequent(counts, size, always)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ('{"tokens": [2, 3, 99]}', "names token 99, and the model has 97 tokens"),
        ('{"tokens": [3, 2]}', "holds no draft vocabulary"),
        ('{"tokens": [2, 2]}', "holds no draft vocabulary"),
        ('{"tokens": []}', "holds no draft vocabulary"),
        ('{"tokens": ["a"]}', "holds no draft vocabulary"),
        ("[1]", "holds no draft vocabulary"),
        ('{"tokens": [2', "holds no draft vocabulary"),
    ],
)
def test_files_that_say_something_else_are_named(tmp_path: Path, stored: str, told: str) -> None:
    _, folder = exported("llama", tmp_path)
    (folder / FILE).write_text(stored)
    with pytest.raises(BadData, match=told):
        load_model(ModelRef(str(folder), proposes=True), VOCABULARY)
