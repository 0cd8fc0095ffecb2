"""Entries that are chosen again: text is the target's, replay is decoding, choices are attention by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode.chain_replay import ChainMatch
from pipeline.decode.feature_head import LeanHead, drafts
from pipeline.decode.model import decode_model
from pipeline.decode.replay import ModelMatch, refreshed_rounds
from pipeline.decode.runner import Runner
from pipeline.decode.target_reader import TargetReader
from pipeline.kv import refresh
from pipeline.kv.positions import frequencies_of
from pipeline.kv.refresh import Refresh, chosen, chunk_shares
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import PrefixView, view_of
from pipeline.models.heads.eagle import FeatureHead
from tests.helpers.feature_heads import OPTIONS, prompt, six_layers, trained_head
from tests.helpers.models import random_tokens
from tests.helpers.pairs import Pair, plain_tokens, rounds_of, tokens_of

LIMIT, GAMMAS = 33, (1, 3, 6)


def guided(n: int, budget: int = 16, positions: str = "true") -> View:
    return replace(view_of("target_guided", budget, positions=positions), refresh=n)  # type: ignore[arg-type]


class Decoding:
    """A target and a drafter behind prompts, whose entries are chosen again."""

    def __init__(
        self, target: PreTrainedModel, drafter: PreTrainedModel, prompts: list[Tensor], view: View
    ) -> None:
        large = decode_model(target)
        small = (
            LeanHead(drafter, TargetReader(large))
            if isinstance(drafter, FeatureHead)
            else decode_model(drafter)
        )
        self.view, self.firsts, wholes = view, [], list[PrefixView]()
        self.kept: list[PrefixView] = []
        self.wholes: list[PrefixView] = []
        for tokens in prompts:
            S = tokens.shape[1]
            (whole,), logits = large.prefill(tokens, [(S, FULL)])
            wholes.append(whole)
            self.firsts.append(int(logits.argmax()))
            (kept, everything), _ = small.prefill(tokens, [(S, view), (S, FULL)], whole.guiding())
            self.kept.append(kept)
            self.wholes.append(everything)
        capacity = slots_for(max(whole.kept for whole in wholes))
        runner = Runner(large, len(prompts), capacity, LIMIT + 10, "none")
        runner.cache.note_queries()
        runner.cache.load(wholes)
        self.small = Runner(small, len(prompts), view.budget, LIMIT + 10, "none")  # type: ignore[arg-type]
        self.pair = Pair(runner, self.small, self.firsts)

    def rounds(self, gamma: int, eos: frozenset[int] = frozenset()) -> list[list]:  # type: ignore[type-arg]
        self.small.cache.load(self.kept)
        caches, frequencies = (self.pair.target.cache, self.small.cache), self.small.model.frequencies  # type: ignore[attr-defined]
        again = Refresh(*caches, self.wholes, self.view, frequencies)
        return rounds_of(self.pair, gamma, LIMIT, eos, source=drafts(self.small, self.kept, 0.0, again))

    def shares(self, text: list[int]) -> Tensor:
        """Of each token of the one prompt's text, from one pass over it."""
        cache = self.pair.target.cache
        tokens, zero = torch.tensor([text[:-1]]), torch.zeros(1, dtype=torch.long)
        self.pair.target.model.hidden(tokens, zero, cache)
        return torch.cat([chunk_shares(cache, 0, step, 1) for step in range(len(text) - 1)])


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
def test_replay_is_decoding_round_by_round(target: PreTrainedModel, drafter: PreTrainedModel, n: int) -> None:
    """Prompts whose last chunk is and is not whole; entries at their places and rebased; with EOS."""
    checked, frozen = 0, 0
    for seed, positions in enumerate(("true", "rebased")):
        tokens, view = random_tokens(1, 88 + 3 * seed, seed), guided(n, 24, positions)
        decoding = Decoding(target, drafter, [tokens], view)
        (plain,) = plain_tokens(decoding.pair, LIMIT)
        shares = decoding.shares(plain)
        for gamma in GAMMAS:
            (rounds,) = decoding.rounds(gamma)
            assert tokens_of(decoding.pair, [rounds]) == [plain]
            match = ModelMatch(drafter, decoding.kept[0], plain)
            of_text = plain, gamma, LIMIT, False
            ends = decoding.kept[0], decoding.wholes[0], shares, frequencies_of(drafter)
            assert refreshed_rounds(match, *ends, *of_text) == rounds
            never = replace(decoding.kept[0], view=replace(view, refresh=1000))
            match = ModelMatch(drafter, never, plain)
            frozen += refreshed_rounds(match, never, *ends[1:], *of_text) != rounds
            checked += len(rounds)
    assert checked > 60 and frozen, "choosing again has changed no round"


@torch.no_grad()
def test_a_heads_replay_is_decoding_round_by_round() -> None:
    target = six_layers(1)
    prompts = [prompt(length, length) for length in (89, 96)]
    with torch.enable_grad():
        head = trained_head(target, prompts, **OPTIONS[1])
    checked = 0
    for tokens in prompts:
        decoding = Decoding(target, head, [tokens], guided(1, 24))
        (plain,) = plain_tokens(decoding.pair, LIMIT)
        shares, S = decoding.shares(plain), tokens.shape[1]
        large = decode_model(target)
        large.feature_layers = tuple(head.config.feature_layers)
        _, _, features = large.read(torch.cat([tokens, torch.tensor([plain[:-1]])], 1), [])
        assert features is not None
        for gamma in GAMMAS:
            (rounds,) = decoding.rounds(gamma)
            assert tokens_of(decoding.pair, [rounds]) == [plain]
            match = ChainMatch(head, plain, features[0, S - 1 : -1], max(GAMMAS))
            ends = decoding.kept[0], decoding.wholes[0], shares, head.rotary.inv_freq
            assert refreshed_rounds(match, *ends, plain, gamma, LIMIT, False) == rounds
            checked += len(rounds)
    assert checked > 30


@torch.no_grad()
def test_rows_choose_one_by_one(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    prompts = [random_tokens(1, length, length) for length in (70, 91, 83)]
    together = Decoding(target, drafter, prompts, guided(2))
    texts = plain_tokens(together.pair, LIMIT)
    eos = frozenset({texts[1][9]})
    rows = together.rounds(3, eos)
    for row, tokens in enumerate(prompts):
        assert Decoding(target, drafter, [tokens], guided(2)).rounds(3, eos) == [rows[row]]


@torch.no_grad()
def test_a_choice_is_the_attention_of_the_tokens_that_stand(
    target: PreTrainedModel, drafter: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the weights that transformers gives, of the last layer at the last round's tokens."""
    tokens = random_tokens(1, 90, 5)
    decoding = Decoding(target, drafter, [tokens], guided(2, 32))
    seen: list[PrefixView] = []

    def watched(*given):  # type: ignore[no-untyped-def]
        seen.append(chosen(*given))
        return seen[-1]

    monkeypatch.setattr(refresh, "chosen", watched)
    (rounds,) = decoding.rounds(3)
    twin = LlamaForCausalLM._from_config(copy.deepcopy(target.config), attn_implementation="eager").eval()
    twin.load_state_dict(target.state_dict())
    (text,) = tokens_of(decoding.pair, [rounds])
    both = torch.cat([tokens, torch.tensor([text])], 1)
    weights_SS = twin(input_ids=both, output_attentions=True).attentions[-1][0].mean(0)
    (everything,), _ = read_prefix(drafter, tokens, [(90, FULL)])
    at = 0
    for number, one in enumerate(rounds):
        stands = slice(90 + at, 90 + at + one.accepted + 1)
        at += one.emitted
        if number % 2 == 0 or number // 2 >= len(seen):
            continue
        mass = [float(weights_SS[stands, 8 * c : 8 * c + 8].mean(0).sum()) for c in range(11)]
        best = [0, *sorted(range(1, 11), key=lambda c: (-mass[c], c))][:3]
        kept = [8 * c + i for c in sorted(best) for i in range(8)] + [88, 89]
        for ours, whole in zip(seen[number // 2].layers, everything.layers, strict=True):
            torch.testing.assert_close(ours[0], whole[0][:, :, kept])
    assert len(seen) > 4
