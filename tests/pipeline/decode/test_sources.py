"""Draft sources without training: lossless, and what prompt lookup proposes."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode import replay
from pipeline.decode.sampling import GREEDY, Sampler
from pipeline.decode.sources import LONGEST_MATCH, LookupDrafts
from pipeline.kv.views import view_of
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of, tokens_of

LIMIT = 25


def found_by_hand(known: list[int], gamma: int) -> list[int]:
    """What followed the latest of the longest earlier matches of the last tokens, over and over."""
    for length in range(LONGEST_MATCH, 0, -1):
        for end in range(len(known) - 1, length - 1, -1):
            if len(known) > length and known[end - length : end] == known[-length:]:
                return [known[end + i % (len(known) - end)] for i in range(gamma)]
    return []


def test_lookup_proposes_what_a_search_by_hand_finds() -> None:
    """Rows of different lengths, over rounds that accept some of what was proposed, in a small alphabet."""
    draw = random.Random(0)
    prompts = [[draw.randrange(6) for _ in range(length)] for length in (9, 30, 17)]
    source, gamma = LookupDrafts(prompts, 60, 6), 5
    texts = [list(prompt) for prompt in prompts]
    unread = torch.tensor([[draw.randrange(6)] for _ in prompts])
    step = torch.zeros(3, dtype=torch.long)
    some = 0
    for row, text in enumerate(texts):
        text.append(int(unread[row, 0]))
    for _ in range(9):
        offer = source.propose(GREEDY, gamma, unread, step, [True] * 3)
        assert offer.lengths is not None
        for row, text in enumerate(texts):
            proposed = offer.tokens_BT[row, : offer.lengths[row]].tolist()
            assert proposed == found_by_hand(text, gamma)
            some += len(proposed)
            taken = draw.randrange(len(proposed) + 1)
            text += [*proposed[:taken], draw.randrange(6)]
        step = torch.tensor([len(t) - len(p) - 2 for t, p in zip(texts, prompts, strict=True)])
        unread = torch.tensor([text[-2:] for text in texts])
    assert some > 40


def test_lookup_without_a_match_proposes_nothing() -> None:
    source = LookupDrafts([[3, 4, 5]], 8, 10)
    offer = source.propose(GREEDY, 4, torch.tensor([[7]]), torch.tensor([0]), [True])
    assert offer.lengths == [0] and offer.tokens_BT.shape == (1, 1)
    # A row that has ended asks for nothing, though it would find something.
    assert source.propose(GREEDY, 4, torch.tensor([[3]]), torch.tensor([0]), [False]).lengths == [0]


def test_lookup_in_a_loop_goes_on_looping() -> None:
    source = LookupDrafts([[1, 2, 3, 4, 3, 4, 3]], 9, 10)
    offer = source.propose(GREEDY, 6, torch.tensor([[4]]), torch.tensor([0]), [True])
    assert offer.tokens_BT.tolist() == [[3, 4, 3, 4, 3, 4]] and offer.lengths == [6]
    with pytest.raises(ValueError, match="room for 9 continuation tokens, not 10"):
        source.check_room(10)
    source = LookupDrafts([[3, 4, 5]], 8, 10)
    with pytest.raises(ValueError, match="room for 8 continuation tokens, not 9"):
        source.check_room(9)


def repetitive(length: int, seed: int) -> torch.Tensor:
    """A prompt in which lookup finds something."""
    part = random_tokens(1, 11, seed)
    return part.repeat(1, length // 11 + 1)[:, :length]


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_lookup_is_lossless_and_its_replay_is_its_decoding(target: PreTrainedModel, gamma: int) -> None:
    """Three prompts decoded together; a token of one text is made its end."""
    prompts = [repetitive(40 + 7 * seed, seed) for seed in range(3)]
    pair = make_pair(target, target, prompts, FULL, LIMIT + gamma)
    texts = plain_tokens(pair, LIMIT)
    eos = frozenset({texts[1][9]})
    texts = plain_tokens(pair, LIMIT, eos)
    tokens = [prompt[0].tolist() for prompt in prompts]
    source = LookupDrafts(tokens, LIMIT + gamma, VOCABULARY)
    rounds = rounds_of(pair, gamma, LIMIT, eos, source=source)
    assert tokens_of(pair, rounds) == texts
    for row, text in enumerate(texts):
        alone = LookupDrafts([tokens[row]], LIMIT + gamma, VOCABULARY)
        replayed = replay.source_rounds(alone, text, gamma, LIMIT, text[-1] in eos)
        assert replayed == rounds[row]
    assert sum(one.accepted for row in rounds for one in row) > 0


@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_self_speculation_is_lossless(target: PreTrainedModel, policy: str) -> None:
    prompt = random_tokens(1, 60, 3)
    pair = make_pair(target, target, [prompt], view_of(policy, 16), LIMIT + 4)
    (rounds,) = rounds_of(pair, 4, LIMIT)
    assert tokens_of(pair, [rounds]) == plain_tokens(pair, LIMIT)
    assert 0 < sum(one.accepted for one in rounds) < sum(one.proposed for one in rounds)


@torch.no_grad()
def test_sampled_lookup_has_the_targets_distribution(target: PreTrainedModel) -> None:
    """The token behind the first, over many seeds, against the target's exact probabilities."""
    prompt, temperature, runs = repetitive(34, 1), 6.0, 1500
    pair = make_pair(target, target, [prompt], FULL, 8)
    sequence = torch.cat([prompt, torch.tensor([pair.firsts])], 1)
    counts, accepted = torch.zeros(VOCABULARY), 0
    # Behind its first token, which the prompt holds, lookup proposes a certain second one.
    pair.firsts[:] = [int(prompt[0, 5])]
    sequence[0, -1] = pair.firsts[0]
    exact = (target(sequence).logits[0, -1] / temperature).softmax(-1)
    for seed in range(runs):
        source = LookupDrafts(prompt.tolist(), 8, VOCABULARY)
        (rounds,) = rounds_of(pair, 2, 2, sampler=Sampler.seeded(temperature, [seed]), source=source)
        counts[rounds[0].tokens[0]] += 1
        accepted += rounds[0].accepted
    sigma = (exact * (1 - exact) / runs).sqrt()
    assert ((counts / runs - exact).abs() < 5 * sigma + 1e-3).all()
    proposed = found_by_hand([*prompt[0].tolist(), pair.firsts[0]], 1)[0]
    assert accepted / runs == pytest.approx(float(exact[proposed]), abs=5 * float(sigma[proposed]))
