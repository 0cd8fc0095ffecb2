"""The policy `target_guided` against attention weights that transformers gives, and choices by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode.model import ModuleModel, decode_model
from pipeline.kv.policies import select
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import view_of
from tests.helpers.models import random_tokens


@torch.no_grad()
def guide_by_hand(model: PreTrainedModel, tokens_1S: Tensor) -> list[int]:
    """All chunks, best first: what the last 16 rows of the last layer's weights give to each."""
    twin = LlamaForCausalLM._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    weights_SS = twin(input_ids=tokens_1S, output_attentions=True).attentions[-1][0].mean(0)
    chunks = range(tokens_1S.shape[1] // 8)
    mass = [float(weights_SS[-16:, 8 * chunk : 8 * chunk + 8].sum()) for chunk in chunks]
    return sorted(chunks, key=lambda chunk: (chunk > 0, -mass[chunk], chunk))


def kept_by_hand(guide: list[int], entries: int, budget: int) -> list[int]:
    tail = entries % 8
    best = [chunk for chunk in guide if chunk < entries // 8][: (budget - tail) // 8]
    return [8 * chunk + at for chunk in sorted(best) for at in range(8)] + [*range(entries - tail, entries)]


@torch.no_grad()
@pytest.mark.parametrize("length", [12, 64, 71, 90, 203])
def test_a_guide_is_the_last_layers_attention(target: PreTrainedModel, length: int) -> None:
    """Whatever reads the prefix, of each row its own; one is shorter than the window of queries."""
    tokens = random_tokens(2, length, seed=length)
    readings = [
        read_prefix(target, tokens, [(length, FULL)])[0],
        decode_model(target, 50).prefill(tokens, [(length, FULL)])[0],
        ModuleModel(target).prefill(tokens, [(length, FULL)])[0],
    ]
    for (whole,) in readings:
        guide = whole.guiding()[length]
        assert guide.tolist() == [guide_by_hand(target, row.unsqueeze(0)) for row in tokens]


@torch.no_grad()
@pytest.mark.parametrize("length", [64, 71, 90])
def test_all_layers_and_heads_keep_the_targets_choice(
    target: PreTrainedModel, drafter: PreTrainedModel, length: int
) -> None:
    tokens = random_tokens(2, length, seed=length)
    ((whole,), _), S = read_prefix(target, tokens, [(length, FULL)]), length
    (everything,), _ = read_prefix(drafter, tokens, [(S, FULL)])
    for budget in (16, 24, 48):
        cuts = [(S, view_of("target_guided", budget))]
        for reads in (read_prefix, lambda model, *read, guides: decode_model(model).prefill(*read, guides)):
            (view,), _ = reads(drafter, tokens, cuts, guides=whole.guiding())
            for row, text in enumerate(tokens):
                kept = kept_by_hand(guide_by_hand(target, text.unsqueeze(0)), S, budget)
                assert len(kept) <= budget
                for ours, whole_layer in zip(view.layers, everything.layers, strict=True):
                    for part, of_all in zip(ours, whole_layer, strict=True):
                        torch.testing.assert_close(part[row], of_all[row][:, kept])


def test_a_head_has_one_entry_less_than_the_prefix_has_tokens() -> None:
    """Of 64 tokens: the last of their 8 chunks is not whole, and its entries are the tail."""
    keys, guide = torch.zeros(1, 2, 63, 4), torch.tensor([[0, 7, 3, 6, 1, 2, 5, 4]])
    kept = select("target_guided", keys, keys.unsqueeze(2), 24, guide_BR=guide)
    assert kept[0, 1].tolist() == kept_by_hand(guide[0].tolist(), 63, 24) == [
        *range(8), *range(24, 32), *range(56, 63)
    ]  # fmt: skip
    first = select("target_guided", keys, keys.unsqueeze(2), 24, guide_BR=guide[:, :3])
    assert torch.equal(first, kept)  # as many as the budget could hold are enough


def test_what_is_missing_is_named() -> None:
    keys = torch.zeros(1, 1, 40, 4)
    with pytest.raises(ValueError, match="target_guided needs a guide"):
        select("target_guided", keys, keys.unsqueeze(2), 16)
    with pytest.raises(ValueError, match="ranks 2 chunks, too few for a budget of 24"):
        select("target_guided", keys, keys.unsqueeze(2), 24, guide_BR=torch.tensor([[0, 3]]))
    whole = select("target_guided", keys, keys.unsqueeze(2), 40)  # nothing is chosen: no guide is needed
    assert whole[0, 0].tolist() == list(range(40))
