"""A head's chains against every chain written out slot by slot; prefixes, initialisation, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.axes import FULL, View
from pipeline.decode.model import decode_model
from pipeline.kv.policies import select
from pipeline.models.heads.begin import default_layers, head_of
from pipeline.models.heads.eagle import FeatureHead
from tests.helpers.feature_heads import OPTIONS, six_layers
from tests.helpers.zoo import our_model, tiny

WINDOWS = (View("window", 16, sinks=0), View("window", 24, sinks=4), View("window", 16, sinks=15))
VIEWS = (FULL, *WINDOWS, View("streaming", 16), View("chunk_topk", 16), View("snapkv", 16), View("none", 0))


def double_head(**options: bool) -> tuple[FeatureHead, Tensor, Tensor]:
    """A head with noise on all its weights, tokens [2, 60] and features."""
    head = head_of(six_layers(3), torch.arange(0, 90, 2), **options).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.1 * torch.randn_like(weight)
    head.attach(head.embedding.double())
    return head, torch.randint(3, 97, (2, 60)), torch.randn(2, 60, 3 * 48, dtype=torch.double)


def norm(weight: Tensor, x: Tensor, head: FeatureHead) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, head.config.rms_norm_eps)


def rotate(x_SHD: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions, by the formula."""
    half = x_SHD.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.double) / half)
    angles = (positions[:, None].double() * frequencies)[:, None]
    left, right = x_SHD[..., :half], x_SHD[..., half:]
    return torch.cat(
        [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1
    )


def one_chain(
    head: FeatureHead, tokens: Tensor, features: Tensor, start: int, at: int, depth: int, view: View
) -> list[Tensor]:
    """Normed outputs [H] of the chain from token `at`, slot by slot, each seeing what decoding would see."""
    layer, config = head.midlayer, head.config
    K, D = config.num_key_value_heads, config.head_dim
    slots: list[tuple[Tensor, Tensor]] = []  # key and value [K, D] of slots 0, 1, …
    queries: list[Tensor] = []

    def fused(feature: Tensor) -> Tensor:
        if config.fc_norm:
            thirds = zip(head.fc_norm, feature.chunk(3), strict=True)
            feature = torch.cat([norm(one.weight, third, head) for one, third in thirds])
        return head.fc.weight @ feature

    def enter(token: int, g: Tensor, position: int) -> tuple[Tensor, Tensor]:
        g_norm = norm(layer.hidden_norm.weight, g, head)
        u = torch.cat([norm(layer.input_layernorm.weight, head.embedding[token], head), g_norm])
        places = torch.tensor([position])
        key = rotate((layer.self_attn.k_proj.weight @ u).view(1, K, D), places)[0]
        query = rotate((layer.self_attn.q_proj.weight @ u).view(1, -1, D), places)[0]
        slots.append((key, (layer.self_attn.v_proj.weight @ u).view(K, D)))
        queries.append(query)
        return query, g_norm if config.norm_before_residual else g

    for slot in range(at - 1):
        enter(int(tokens[slot + 1]), fused(features[slot]), slot)
    prefix = start - 1
    keys = torch.stack([key for key, _ in slots[:prefix]], 1)
    observed = torch.stack(queries[:prefix][-16:], 1).unflatten(0, (K, -1)).unsqueeze(0)
    kept = torch.arange(prefix).expand(1, K, prefix)
    if view.budget != "full":
        # A window is held by its definition below: here it may see all.
        policy, budget = ("none", prefix) if view.policy == "window" else (view.policy, view.budget)
        kept = select(policy, keys.unsqueeze(0).detach(), observed.detach(), budget)
    outputs: list[Tensor] = []
    g = fused(features[at - 1])
    for step in range(depth):
        query, residual = enter(int(tokens[at + step]), g, at - 1 + step)
        heads = []
        for number in range(query.shape[0]):
            group = number // (query.shape[0] // K)
            places = [*kept[0, group].tolist(), *range(prefix, at + step)]
            if view.policy == "window":
                asking, recent = at - 1 + step, view.budget - view.sinks
                places = [p for p in places if p < view.sinks or p > asking - recent]
            seen = torch.stack([slots[place][0][group] for place in places])
            weights = ((seen @ query[number]) / D**0.5).softmax(-1)
            heads.append(weights @ torch.stack([slots[place][1][group] for place in places]))
        z = residual + layer.self_attn.o_proj.weight @ torch.cat(heads)
        normed = norm(layer.post_attention_layernorm.weight, z, head)
        gate = F.silu(layer.mlp.gate_proj.weight @ normed) * (layer.mlp.up_proj.weight @ normed)
        z = z + layer.mlp.down_proj.weight @ gate
        out = norm(head.norm.weight, z, head)
        outputs.append(out)
        g = out if config.norm_output else z
    return outputs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_chains_are_dense_forwards_chain_by_chain_with_their_gradients(
    options: dict[str, bool], view: View
) -> None:
    head, tokens, features = double_head(**options)
    starts, length, depth = [33, 41], 6, 3
    found = head(tokens, features, starts, length, [view], depth)
    loss, expected = torch.zeros((), dtype=torch.double), torch.zeros((), dtype=torch.double)
    torch.manual_seed(9)
    for at in range(depth):
        for window, start in enumerate(starts):
            for row in range(2):
                for token in (0, 2, length - depth):
                    ours = found[at][window * 2 + row, token]
                    chain = one_chain(head, tokens[row], features[row], start, start + token, at + 1, view)
                    torch.testing.assert_close(ours, chain[-1], atol=1e-5, rtol=1e-5)  # rotations are in fp32
                    direction = torch.randn_like(ours)
                    loss, expected = loss + ours @ direction, expected + chain[-1] @ direction
    ours = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(head.parameters()), allow_unused=True)
    for (name, _), mine, other in zip(head.named_parameters(), ours, theirs, strict=True):
        assert (mine is None) == (other is None) == name.startswith("lm_head")
        if mine is not None and other is not None:
            assert mine.abs().max() > 0 or view.budget == 0
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4, msg=name)


def test_views_of_several_are_each_their_own() -> None:
    head, tokens, features = double_head()
    together = head(tokens, features, [33, 41], 6, VIEWS, 2)
    for number, view in enumerate(VIEWS):
        for both, alone in zip(together, head(tokens, features, [33, 41], 6, [view], 2), strict=True):
            torch.testing.assert_close(both[number * 4 : number * 4 + 4], alone)


def test_a_prefix_is_the_slots_that_a_window_sees() -> None:
    head, tokens, features = double_head()
    for view, length in ((FULL, 40), (View("streaming", 24), 40), (View("chunk_topk", 16), 31)):
        (kept,) = head.prefix(tokens, features, [(length, view)])
        assert kept.prefix_tokens == length - 1
        assert kept.kept <= (length - 1 if view is FULL else view.budget)
        assert view.policy == "chunk_topk" or kept.kept in (length - 1, view.budget)


def test_it_begins_as_the_targets_last_layer() -> None:
    target = six_layers(2)
    head = head_of(target, torch.arange(10, 50))
    last = target.model.layers[-1]
    torch.testing.assert_close(head.midlayer.self_attn.k_proj.weight[:, 48:], last.self_attn.k_proj.weight)
    torch.testing.assert_close(head.midlayer.mlp.up_proj.weight, last.mlp.up_proj.weight)
    torch.testing.assert_close(head.lm_head.weight, target.lm_head.weight[10:50])
    assert head.config.feature_layers == [2, 3, 3] == default_layers(6)
    assert head.embedding.data_ptr() == target.get_input_embeddings().weight.data_ptr()
    again = head_of(target, torch.arange(10, 50))
    for (name, weight), other in zip(head.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "qwen3", "olmo2"])
def test_it_can_be_of_any_supported_target(kind: str) -> None:
    """Features are the inputs of layers, as transformers' own hidden states."""
    target = our_model(tiny(kind, num_hidden_layers=4))
    head = head_of(target, torch.arange(20), [1, 2, 3])
    large = decode_model(target)
    large.feature_layers = (1, 2, 3)
    tokens = torch.randint(3, target.num_tokens, (2, 24))
    _, _, features = large.read(tokens, [])
    states = target.base_model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(features, torch.cat([states[i] for i in (1, 2, 3)], -1), atol=1e-5, rtol=1e-4)
    assert features is not None
    out = head(tokens, features, [12], 6, [FULL], 2)
    assert all(torch.isfinite(one).all() for one in out)


def test_a_folder_gives_it_back(tmp_path: Path) -> None:
    head, tokens, features = double_head(fc_norm=True)
    head.float().save_pretrained(tmp_path)
    again: Any = FeatureHead.from_pretrained(tmp_path).attach(head.embedding.float())
    ours, theirs = (
        one(tokens, features.float(), [30], 5, [FULL], 2) for one in (head.attach(again.embedding), again)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    assert "embedding" not in {name.split(".")[0] for name in again.state_dict()}
