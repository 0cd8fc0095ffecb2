"""DropMatch against masks that are applied one by one, outside of the engine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.decode.dropmatch import DropMatch
from pipeline.decode.sampling import Chance, Sampler
from pipeline.kv.views import view_of
from pipeline.metrics import Round
from tests.helpers.models import random_tokens
from tests.helpers.pairs import Pair, make_pair, plain_tokens, rounds_of, tokens_of

LIMIT, GAMMA = 40, 4
RULE = DropMatch(masks=5, dropout=0.3, seed=7)


def lossy(rule: DropMatch) -> Sampler:
    return Chance(0.0, 0, rule).sampler([])


@torch.no_grad()
def given(model: PreTrainedModel, tokens: list[int], rule: DropMatch) -> tuple[list[int], list[set[int]]]:
    """Behind each token: the target's arg-max, and those of the masked hidden state, one mask at a time."""
    hidden_SC = model.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    weight_VC = model.get_output_embeddings().weight
    best, masked = F.linear(hidden_SC, weight_VC).argmax(-1).tolist(), []
    for position, hidden_C in enumerate(hidden_SC, start=1):  # of the token that is predicted
        found = set()
        for number in range(rule.masks):
            kept_C = rule.kept(number, torch.tensor([[position]]), len(hidden_C))[0, 0]
            dropped_C = torch.where(kept_C, hidden_C / (1 - rule.dropout), 0.0)
            found.add(int(F.linear(dropped_C, weight_VC).argmax()))
        masked.append(found)
    return best, masked


def check(
    model: PreTrainedModel, prompt: Tensor, text: list[int], rounds: list[Round], rule: DropMatch
) -> int:
    """Every round accepts what the oracle says, and no more; how many proposals stand by a mask alone."""
    before = prompt[0].tolist()
    best, masked = given(model, before + text, rule)
    at, by_mask = len(before) + 1, 0  # of the round's first token
    for one in rounds:
        for place, token in enumerate(one.tokens):
            own, others = best[at + place - 1], masked[at + place - 1]
            if place < one.accepted:
                assert token == own or token in others
                by_mask += token != own
            else:  # the correction or the bonus token
                assert token == own
        at += len(one.tokens)
    return by_mask


@pytest.mark.parametrize("prompts", [1, 3])
def test_what_is_accepted_is_what_masks_applied_one_by_one_give(
    target: PreTrainedModel, drafter: PreTrainedModel, prompts: int
) -> None:
    """Prompts of several lengths, each with masks of its own positions."""
    tokens = [random_tokens(1, 40 + 7 * row, row) for row in range(prompts)]
    pair = make_pair(target, drafter, tokens, view_of("streaming", 16), LIMIT + GAMMA)
    rounds = rounds_of(pair, GAMMA, LIMIT, sampler=lossy(RULE))
    texts = tokens_of(pair, rounds)
    by_mask = sum(check(target, *row, RULE) for row in zip(tokens, texts, rounds, strict=True))
    assert by_mask > 0 and texts != plain_tokens(pair, LIMIT)


def refused(pair: Pair, rule: DropMatch, gamma: int) -> list[tuple[list[int], int]]:
    """The proposals that ended each round early: the text before each, and the proposal itself."""
    offered: list[list[int]] = []
    verify = pair.target.verify

    def watched(*arguments: Tensor) -> object:
        offered.append(arguments[2][0].tolist())
        return verify(*arguments)

    pair.target.verify = watched  # type: ignore[method-assign,assignment]
    (rounds,) = rounds_of(pair, gamma, LIMIT, sampler=lossy(rule))
    text, found = [pair.firsts[0]], []
    for one, proposals in zip(rounds, offered, strict=True):
        if one.accepted < len(one.tokens) and one.accepted < one.proposed:
            found.append(([*text, *one.tokens[: one.accepted]], proposals[one.accepted]))
        text += one.tokens
    return found


def test_what_is_refused_no_mask_gives(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    prompt = random_tokens(1, 41)
    pair = make_pair(target, drafter, [prompt], view_of("streaming", 16), LIMIT + GAMMA)
    found = refused(pair, RULE, GAMMA)
    assert found
    for text, proposal in found:
        best, masked = given(target, prompt[0].tolist() + text, RULE)
        assert proposal != best[-1] and proposal not in masked[-1]


@pytest.mark.parametrize("rule", [DropMatch(0, 0.3, 7), DropMatch(5, 1e-9, 7)])
def test_without_masks_or_dropout_it_is_exact(
    target: PreTrainedModel, drafter: PreTrainedModel, rule: DropMatch
) -> None:
    pair = make_pair(target, drafter, [random_tokens(1, 44)], view_of("streaming", 16), LIMIT + GAMMA)
    expected = rounds_of(pair, GAMMA, LIMIT)
    assert rounds_of(pair, GAMMA, LIMIT, sampler=lossy(rule)) == expected
    assert tokens_of(pair, expected) == plain_tokens(pair, LIMIT)


def test_runs_repeat_and_another_seed_has_other_masks(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    pair = make_pair(target, drafter, [random_tokens(1, 44)], view_of("streaming", 16), LIMIT + GAMMA)
    texts = [
        tokens_of(pair, rounds_of(pair, GAMMA, LIMIT, sampler=lossy(DropMatch(5, 0.3, seed))))[0]
        for seed in (7, 7, *range(8, 12))
    ]
    assert texts[0] == texts[1] and any(text != texts[0] for text in texts)


def test_a_mask_belongs_to_a_position_wherever_a_round_begins() -> None:
    whole = RULE.kept(2, torch.arange(50).unsqueeze(0), 64)
    for first in (0, 17, 40):
        positions = torch.arange(first, first + 10).unsqueeze(0)
        assert torch.equal(RULE.kept(2, positions, 64), whole[:, first : first + 10])


def test_masks_drop_their_share_independently() -> None:
    """Of neighbouring positions, other masks and other seeds: shares within five standard errors."""
    positions = torch.arange(3000, 3200).unsqueeze(0)
    masks = [
        ~DropMatch(5, 0.3, seed).kept(number, positions, 512)[0].flatten()
        for seed in (0, 1)
        for number in (0, 1)
    ]
    masks.append(~DropMatch(5, 0.3, 0).kept(0, positions + 1, 512)[0].flatten())
    error = (0.3 * 0.7 / masks[0].numel()) ** 0.5
    for at, one in enumerate(masks):
        assert abs(float(one.float().mean()) - 0.3) < 5 * error
        for other in masks[at + 1 :]:
            both = float((one & other).float().mean())
            assert abs(both - 0.09) < 5 * (0.09 * 0.91 / one.numel()) ** 0.5


@pytest.mark.slow
def test_compiled_it_emits_the_same(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    found = []
    for compile in ("none", "inductor"):
        view = view_of("streaming", 16)
        pair = make_pair(target, drafter, [random_tokens(1, 50)], view, LIMIT + 2, compile)  # type: ignore[arg-type]
        found.append(rounds_of(pair, 2, LIMIT, sampler=lossy(DropMatch(2, 0.3, 7))))
    assert found[0] == found[1]
