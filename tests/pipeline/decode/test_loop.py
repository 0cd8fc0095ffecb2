"""Speculation against autoregressive decoding, transformers' generate, and the target's own distribution."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from kernels import reference
from pipeline.axes import FULL, View
from pipeline.decode.sampling import Sampler
from pipeline.errors import NotFinite
from pipeline.kv.views import view_of
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.pairs import NEVER, make_pair, plain_tokens, rounds_of, tokens_of


def decode(target, drafter, tokens, view: View, gamma, limit, eos=NEVER):  # type: ignore[no-untyped-def]
    """(tokens of AR, tokens of speculation, rounds) for one prompt, greedily."""
    pair = make_pair(target, drafter, [tokens], view, limit + gamma)
    (plain,) = plain_tokens(pair, limit, eos)
    rounds = rounds_of(pair, gamma, limit, eos)
    return plain, tokens_of(pair, rounds)[0], rounds[0]


def test_autoregressive_equals_transformers_generate(target: PreTrainedModel) -> None:
    tokens = random_tokens(1, 50)
    twin = LlamaForCausalLM._from_config(copy.deepcopy(target.config), attn_implementation="sdpa").eval()
    twin.load_state_dict(target.state_dict())
    twin.generation_config.eos_token_id = None
    theirs = twin.generate(tokens, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, 50:].tolist()
    ours, _, _ = decode(target, target, tokens, FULL, 4, 40)
    assert ours == theirs


@pytest.mark.parametrize(
    ("policy", "budget"),
    [
        ("chunk_topk", 16),
        ("chunk_topk_paper", 24),
        ("streaming", 16),
        ("snapkv", 32),
        ("none", 0),
        ("x", "full"),
        ("window", 16),
    ],
)
@pytest.mark.parametrize("gamma", [1, 2, 5, 17])
def test_greedy_speculation_is_autoregressive(
    target: PreTrainedModel, drafter: PreTrainedModel, policy: str, budget: int | str, gamma: int
) -> None:
    for seed in range(3):
        plain, ours, rounds = decode(
            target, drafter, random_tokens(1, 45 + seed, seed), view_of(policy, budget), gamma, 33
        )
        assert ours == plain and len(ours) == 33
        assert sum(len(one.tokens) for one in rounds) == 32
        allowed = 32
        for one in rounds:  # a round proposes min(γ, tokens still allowed)
            assert one.proposed == min(gamma, allowed)
            assert one.accepted <= one.proposed
            allowed -= len(one.tokens)


def test_the_target_as_its_own_drafter_is_always_accepted(target: PreTrainedModel) -> None:
    _, _, rounds = decode(target, target, random_tokens(1, 40), FULL, 4, 41)
    assert all(one.accepted == one.proposed == 4 and len(one.tokens) == 5 for one in rounds)


def test_eos_inside_an_accepted_draft_stops(target: PreTrainedModel) -> None:
    """Whatever token is declared to end the text, both decoders end at its first occurrence."""
    tokens = random_tokens(1, 40)
    plain, _, _ = decode(target, target, tokens, FULL, 6, 30)
    for place in range(1, 29):
        eos = frozenset({plain[place]})
        short, ours, rounds = decode(target, target, tokens, FULL, 6, 30, eos)
        assert ours == short == plain[: plain.index(plain[place]) + 1]
        if rounds:
            # The target drafts for itself: everything before the end is accepted, nothing behind it counts.
            assert sum(one.proposed for one in rounds) == sum(one.accepted for one in rounds)
            assert all(one.proposed <= len(one.tokens) for one in rounds)


@torch.no_grad()
def test_sampled_speculation_has_the_targets_distribution(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    """Second and third emitted tokens over many seeds against the target's exact joint distribution, by a
    total-variation distance that plain sampling of the same size stays under as well."""
    tokens, temperature, runs = random_tokens(1, 24), 6.0, 1500
    pair = make_pair(target, drafter, [tokens], view_of("streaming", 16), 8)
    (first,) = pair.firsts
    exact_1 = (target(torch.cat([tokens, torch.tensor([[first]])], 1)).logits[0, -1] / temperature).softmax(
        -1
    )
    counts, following = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    likely = int(exact_1.argmax())
    for seed in range(runs):
        (rounds,) = rounds_of(pair, 2, 3, sampler=Sampler.seeded(temperature, [seed]))
        emitted = [token for one in rounds for token in one.tokens]
        counts[emitted[0]] += 1
        if emitted[0] == likely:
            following[emitted[1]] += 1
    generator = torch.Generator().manual_seed(0)

    def distance(observed: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
        total = int(observed.sum())
        plain = torch.bincount(
            torch.multinomial(exact, total, replacement=True, generator=generator), minlength=VOCABULARY
        )
        return (
            float((observed / total - exact).abs().sum() / 2),
            float((plain / total - exact).abs().sum() / 2),
        )

    ours, plain = distance(counts, exact_1)
    assert ours < 1.3 * plain + 0.01
    sequence = torch.cat([tokens, torch.tensor([[first, likely]])], 1)
    ours, plain = distance(following, (target(sequence).logits[0, -1] / temperature).softmax(-1))
    assert ours < 1.3 * plain + 0.02


def test_rejection_sampling_alone_is_exact() -> None:
    """A three-token vocabulary, where drafter and target disagree strongly: frequencies within 4 sigma."""
    p, q = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]), torch.tensor([[0.1, 0.2, 0.7]])
    generator = torch.Generator().manual_seed(0)
    runs = 20_000
    drafts = torch.multinomial(q[0], runs, replacement=True, generator=generator)
    uniforms = torch.rand(runs, 2, generator=generator)
    accepted, following = reference.rejection_accept(
        drafts.unsqueeze(1), q.expand(runs, 1, 3), p.expand(runs, 2, 3), uniforms
    )
    first = torch.where(accepted == 1, drafts, following)
    counts, second = first.bincount(minlength=3), following[accepted == 1].bincount(minlength=3)
    accepted_total = int(accepted.sum())
    sigma = (p[0] * (1 - p[0]) / runs).sqrt()
    assert ((counts / runs - p[0]).abs() < 4 * sigma).all()
    assert abs(accepted_total / runs - float(torch.minimum(p[0], q[0]).sum())) < 0.015
    assert ((second / second.sum() - p[1]).abs() < 0.02).all()


def test_nan_is_an_error_not_token_zero(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    broken = copy.deepcopy(drafter)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="not finite"):
        decode(target, broken, random_tokens(1, 30), FULL, 3, 10)
