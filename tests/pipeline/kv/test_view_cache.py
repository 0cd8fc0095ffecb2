"""Views and caches against one dense forward with an explicit mask, which knows nothing of caches."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.kv.attention import causal_attention
from pipeline.kv.policies import select
from pipeline.kv.view_cache import WHOLE, ViewCache, attend, read_continuation, read_prefix
from pipeline.kv.views import view_of
from tests.helpers.models import random_tokens


def eager_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights under transformers' own attention."""
    config = copy.deepcopy(model.config)
    twin = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@torch.no_grad()
def test_full_view_equals_a_plain_forward(target: PreTrainedModel) -> None:
    tokens = random_tokens(2, 75)
    plain = eager_twin(target)(input_ids=tokens).logits
    views, logits = read_prefix(target, tokens[:, :60], [(60, FULL)])
    torch.testing.assert_close(logits, plain[:, 59], atol=1e-4, rtol=1e-4)
    cache = ViewCache(views, capacity=15)
    rest = read_continuation(target, cache, tokens[:, 60:], torch.arange(60, 75).unsqueeze(0))
    torch.testing.assert_close(rest, plain[:, 60:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cache_of_transformers_own_is_read_to_its_end(target: PreTrainedModel) -> None:
    """In pieces of several tokens and of one, as `generate` and its assistants read."""
    tokens = random_tokens(2, 40)
    plain = eager_twin(target)(input_ids=tokens).logits
    cache, pieces = DynamicCache(), []
    for start, end in ((0, 30), (30, 31), (31, 37), (37, 40)):
        pieces.append(target(input_ids=tokens[:, start:end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["chunk_topk", "streaming", "snapkv", "none"])
def test_sparse_view_equals_a_dense_mask(make_model, policy: str) -> None:  # type: ignore[no-untyped-def]
    """With one key/value head the kept entries are one set per layer; a single layer makes them computable
    from outside: take the keys that transformers' own forward makes, select, and mask the rest."""
    model = make_model(layers=1, heads=4, kv_heads=1, seed=3)
    tokens, S = random_tokens(1, 70), 58
    budget = 0 if policy == "none" else 24
    twin = eager_twin(model)
    recorded: dict[str, torch.Tensor] = {}

    def record(module, args, kwargs, output) -> None:  # type: ignore[no-untyped-def]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        query = module.q_proj(hidden).view(shape).transpose(1, 2)
        key = module.k_proj(hidden).view(shape).transpose(1, 2)
        recorded["query"], recorded["key"] = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])

    handle = twin.model.layers[0].self_attn.register_forward_hook(record, with_kwargs=True)
    twin(input_ids=tokens)
    handle.remove()
    keys = recorded["key"][:, :, :S]
    queries = recorded["query"][:, :, :S].unflatten(1, (1, 4))
    kept = select(policy, keys, queries[:, :, :, -16:], budget)[0, 0]

    mask = torch.full((70, 70), float("-inf")).triu(1)
    hidden = torch.ones(S, dtype=torch.bool)
    hidden[kept] = False
    mask[S:, :S][:, hidden] = float("-inf")
    dense = twin(input_ids=tokens, attention_mask=mask.view(1, 1, 70, 70)).logits[:, S:]

    views, _ = read_prefix(model, tokens[:, :S], [(S, View(policy, budget))])
    assert views[0].kept == len(kept)
    cache = ViewCache(views, capacity=12)
    ours = read_continuation(model, cache, tokens[:, S:], torch.arange(S, 70).unsqueeze(0))
    torch.testing.assert_close(ours, dense, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_with_another_attention_is_refused(target: PreTrainedModel) -> None:
    """It would see a view's entries, if at all, without what hides the others."""
    tokens = random_tokens(1, 30)
    views, _ = read_prefix(target, tokens[:, :20], [(20, view_of("window", 16))])
    cache = ViewCache(views, capacity=10)
    with pytest.raises(ValueError, match="attends by 'eager', which knows no views"):
        read_continuation(eager_twin(target), cache, tokens[:, 20:], torch.arange(20, 30).unsqueeze(0))


@torch.no_grad()
def test_token_by_token_equals_at_once(drafter: PreTrainedModel) -> None:
    tokens, S = random_tokens(1, 80), 64
    views, _ = read_prefix(drafter, tokens[:, :S], [(S, view_of("chunk_topk", 16))])
    at_once = ViewCache(views, capacity=16)
    whole = read_continuation(drafter, at_once, tokens[:, S:], torch.arange(S, 80).unsqueeze(0))
    cache = ViewCache(views, capacity=16)
    for position in range(S, 80):
        step = read_continuation(
            drafter, cache, tokens[:, position : position + 1], torch.tensor([[position]])
        )
        torch.testing.assert_close(step[:, 0], whole[:, position - S], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_many_views_in_one_forward_equal_separate_forwards(drafter: PreTrainedModel) -> None:
    tokens, S = random_tokens(2, 60), 45
    views = [
        FULL,
        view_of("chunk_topk", 24),
        view_of("streaming", 24),
        view_of("snapkv", 16),
        view_of("x", 0),
    ]
    kept, _ = read_prefix(drafter, tokens[:, :S], [(S, view) for view in views])
    positions = torch.arange(S, 60).unsqueeze(0)
    together = read_continuation(
        drafter, ViewCache(kept, capacity=15), tokens[:, S:].repeat(len(views), 1), positions
    )
    for number, view in enumerate(kept):
        alone = read_continuation(drafter, ViewCache([view], capacity=15), tokens[:, S:], positions)
        torch.testing.assert_close(together[2 * number : 2 * number + 2], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_cut_inside_a_longer_read_equals_reading_only_that_prefix(drafter: PreTrainedModel) -> None:
    tokens = random_tokens(1, 90)
    view = view_of("snapkv", 24)
    (early, late), _ = read_prefix(drafter, tokens, [(41, view), (90, view)])
    (alone,), _ = read_prefix(drafter, tokens[:, :41], [(41, view)])
    for (keys, values), (keys_alone, values_alone) in zip(early.layers, alone.layers, strict=True):
        torch.testing.assert_close(keys, keys_alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, values_alone, atol=1e-5, rtol=1e-5)
    assert late.kept == 24


def test_budget_bounds_the_stored_bytes(drafter: PreTrainedModel) -> None:
    """24 entries × keys and values × key/value heads × head width × layers × 4 bytes."""
    (view,), _ = read_prefix(drafter, random_tokens(1, 96), [(96, view_of("chunk_topk", 24))])
    assert view.num_bytes == 24 * 2 * 2 * (48 // 4) * 3 * 4


def test_no_room_is_a_clear_error(drafter: PreTrainedModel) -> None:
    views, _ = read_prefix(drafter, random_tokens(1, 20), [(20, FULL)])
    with pytest.raises(ValueError, match="room for 3 continuation tokens, not 4"):
        read_continuation(
            drafter, ViewCache(views, 3), random_tokens(1, 4), torch.arange(20, 24).unsqueeze(0)
        )


def test_sliding_windows_are_refused_unless_no_text_reaches_them() -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match="attention with a sliding window is not supported"):
        attend(module, query, key, value, None, 0.5, sliding_window=16)
    setattr(module, WHOLE, True)
    output, _ = attend(module, query, key, value, None, 0.5, sliding_window=16)
    torch.testing.assert_close(output.transpose(1, 2), causal_attention(query, key, value, 0.5))
