"""Moved entries against plain forwards of texts in which they stand where they were moved to.

In a model of one layer an entry depends on its token and its position alone. So what follows entries that
were moved together is what follows a text of their tokens, and so for other positions that are written out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode.model import decode_model
from pipeline.kv.policies import select
from pipeline.kv.positions import moves
from pipeline.kv.view_cache import ViewCache, read_continuation, read_prefix
from pipeline.kv.views import PrefixView, view_of
from tests.helpers.models import VOCABULARY, random_tokens

S, TOTAL = 58, 75  # tokens of the prefix, and with the continuation


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(layers=1, kv_heads=1, seed=3)


@torch.no_grad()
def plain(model: PreTrainedModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits of the continuation in transformers' own forward of a text at written-out positions."""
    twin = LlamaForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="sdpa").eval()
    twin.load_state_dict(model.state_dict())
    mask = torch.full((1, 1, tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
    logits = twin(input_ids=tokens, position_ids=positions.unsqueeze(0), attention_mask=mask).logits
    return logits[:, S - TOTAL :]


@torch.no_grad()
def behind(model: PreTrainedModel, view: PrefixView, tokens: Tensor) -> Tensor:
    cache = ViewCache([view], capacity=TOTAL - S)
    return read_continuation(model, cache, tokens[:, S:], torch.arange(S, TOTAL).unsqueeze(0))


def kept_of(model: PreTrainedModel, tokens: Tensor, policy: str, budget: int) -> Tensor:
    """Which entries the view keeps: those whose values are in it; of a text in which no token comes twice."""
    (full, sparse), _ = read_prefix(model, tokens[:, :S], [(S, FULL), (S, view_of(policy, budget))])
    same = (full.layers[0][1][0, 0].unsqueeze(0) == sparse.layers[0][1][0, 0].unsqueeze(1)).all(-1)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


@pytest.mark.parametrize(("policy", "budget"), [("chunk_topk", 24), ("streaming", 16), ("snapkv", 32)])
def test_rebased_entries_stand_as_a_text_of_their_own(
    model: PreTrainedModel, policy: str, budget: int
) -> None:
    tokens = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(0))[:TOTAL].unsqueeze(0)
    kept = kept_of(model, tokens, policy, budget)
    assert (kept.diff() > 1).any(), "there are gaps to close"
    text = torch.cat([tokens[:, kept], tokens[:, S:]], 1)
    expected = plain(model, text, torch.arange(text.shape[1]))
    cuts = [(S, view_of(policy, budget, positions="rebased")), (S, view_of(policy, budget))]
    for views, _ in (
        read_prefix(model, tokens[:, :S], cuts),
        decode_model(model, 20).prefill(tokens[:, :S], cuts),
    ):
        torch.testing.assert_close(behind(model, views[0], tokens), expected, atol=1e-4, rtol=1e-4)
        assert (behind(model, views[1], tokens) - expected).abs().max() > 1e-3
        torch.testing.assert_close(views[0].layers[0][1], views[1].layers[0][1], msg="values stay")


@pytest.mark.parametrize("offset", [0, 37, 4000])
@pytest.mark.parametrize("view", [FULL, view_of("streaming", 16), View("window", 24, sinks=6)])
def test_an_offset_makes_a_short_text_a_long_one(model: PreTrainedModel, view: View, offset: int) -> None:
    """What lies behind the sinks stands as far from them as in a text that is longer by the offset."""
    tokens, sinks = random_tokens(1, TOTAL), 6 if view.policy == "window" else 4
    (kept,), _ = read_prefix(model, tokens[:, :S], [(S, view)], offset)
    entries = torch.arange(S)
    if view.budget != "full":
        entries = torch.cat([entries[:sinks], entries[S - view.budget + sinks :]])
    at = torch.cat([torch.where(entries < sinks, entries, entries + offset), torch.arange(S, TOTAL) + offset])
    expected = plain(model, torch.cat([tokens[:, entries], tokens[:, S:]], 1), at)
    if view.policy == "window":  # later queries see less; the first sees what is kept
        kept, expected = PrefixView(view_of("streaming", 24), S, kept.layers), expected[:, :1]
    found = behind(model, kept, tokens)[:, : expected.shape[1]]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_gaps_nothing_is_moved() -> None:
    assert view_of("chunk_topk", "full", positions="rebased") == FULL
    for view in (view_of("window", 16, positions="rebased"), view_of("chunk_topk", 0, positions="rebased")):
        assert view.positions == "true"
    keys = torch.randn(1, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    kept = select("chunk_topk", keys, keys[:, :, :0].unsqueeze(2), 32)
    by = moves(view_of("chunk_topk", 32, positions="rebased"), kept, 24, 0)
    assert by is not None and not by.any()


def test_a_model_that_does_not_rotate_is_refused() -> None:
    view = PrefixView(view_of("streaming", 16, positions="rebased"), 40)
    part = torch.zeros(1, 1, 40, 8)
    with pytest.raises(ValueError, match="rotate all of a key one way"):
        view.cut(part, part, part[:, :, :0].unsqueeze(2))
