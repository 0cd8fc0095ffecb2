"""Windows against one dense forward of transformers' own, in which every token's window is a mask."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode.model import decode_model
from pipeline.kv import attention
from pipeline.kv.attention import Span, windowed_attention
from pipeline.kv.view_cache import ViewCache, read_continuation, read_prefix
from pipeline.kv.views import readings, view_of
from tests.helpers.models import random_tokens

S, TOTAL = 58, 75  # tokens of the prefix, and with the continuation


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fewer queries than a prefix has, and no divisor of it."""
    monkeypatch.setattr(attention, "BLOCK", 13)


def hidden_from(tokens: int, sinks: int, recent: int) -> Tensor:
    """[T, T] whether a query does not see a token, pair by pair."""
    return torch.tensor(
        [[not (key <= query and (key < sinks or key > query - recent)) for key in range(tokens)]
         for query in range(tokens)]
    )  # fmt: skip


@torch.no_grad()
def dense_logits(model: PreTrainedModel, tokens: Tensor, sinks: int, recent: int) -> Tensor:
    """[B, T, V] of all tokens, each seeing its window in every layer."""
    twin = LlamaForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    T = tokens.shape[1]
    mask = torch.zeros(T, T).masked_fill(hidden_from(T, sinks, recent), -torch.inf)
    return twin(input_ids=tokens, attention_mask=mask.expand(len(tokens), 1, T, T)).logits


@pytest.mark.parametrize("span", [Span(0, 9), Span(4, 5), Span(3, 60)])
@pytest.mark.parametrize("queries", [1, 20, 41])
def test_attention_through_a_window_is_attention_with_a_mask(span: Span, queries: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 41, 8), torch.randn(2, 2, 41, 8)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    weights = scores.masked_fill(hidden_from(41, *span)[-queries:], -torch.inf).softmax(-1)
    expected = weights @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(windowed_attention(query, key, value, 0.3, span), expected)


@torch.no_grad()
@pytest.mark.parametrize(("budget", "sinks"), [(16, 0), (24, 4), (64, 4)])  # the last holds the whole prefix
def test_several_layers_read_prefix_and_continuation_through_a_window(
    make_model: Callable[..., PreTrainedModel], budget: int, sinks: int
) -> None:
    model, tokens = make_model(layers=3, seed=5), random_tokens(2, TOTAL)
    dense = dense_logits(model, tokens, sinks, budget - sinks)[:, S:]
    full = dense_logits(model, tokens, 0, TOTAL)
    cuts = [(S, view_of("window", budget, sinks)), (S, FULL), (S, view_of("streaming", 16))]
    lean = decode_model(model, prefill_chunk=20)
    for views, logits in (read_prefix(model, tokens[:, :S], cuts), lean.prefill(tokens[:, :S], cuts)):
        torch.testing.assert_close(logits, full[:, S - 1], atol=1e-4, rtol=1e-4)
        cache = ViewCache(views[:2], capacity=TOTAL - S)
        positions = torch.arange(S, TOTAL).unsqueeze(0)
        behind = read_continuation(model, cache, tokens[:, S:].repeat(2, 1), positions)
        torch.testing.assert_close(behind[:2], dense, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(behind[2:], full[:, S:], atol=1e-4, rtol=1e-4)
    assert (dense - full[:, S:]).abs().max() > 1e-2, "the window must hide something"


def test_each_window_is_a_reading_and_other_views_share_one() -> None:
    views = [view_of("window", 16), FULL, view_of("window", 24, 4), view_of("streaming", 16)]
    cuts = [*((40, view) for view in views), (30, views[0]), (12, views[0]), (40, view_of("window", 64))]
    assert readings(cuts) == {None: [1, 3, 5, 6], Span(0, 16): [0, 4], Span(4, 20): [2]}
    assert readings(cuts[:1]) == {Span(0, 16): [0]} and readings([]) == {None: []}
