"""Replay against decoding, round by round, and against counts done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode import replay
from pipeline.decode.model import decode_model
from pipeline.decode.sampling import Chance
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import view_of
from pipeline.metrics import Counts, Round
from pipeline.train.target.labelling import write_ahead
from tests.helpers.models import random_tokens
from tests.helpers.pairs import NEVER, make_pair, plain_tokens, rounds_of

POLICIES = ("chunk_topk", "streaming", "snapkv")
GRID: list[tuple[Any, ...]] = [
    ("chunk_topk", 16), ("streaming", 16), ("snapkv", 24), ("none", 0), ("x", "full"), ("window", 16),
    ("window", 24, 4), ("chunk_topk", 24, 0, "rebased"), ("target_guided", 16), ("target_guided", 24),
]  # fmt: skip


@pytest.mark.parametrize("ends", [pytest.param(False, marks=pytest.mark.slow), True])
def test_replay_is_decoding_round_by_round(
    target: PreTrainedModel, drafter: PreTrainedModel, ends: bool
) -> None:
    """3 policies and more, 6 budgets, 5 γ, 4 prompts; with `ends`, a token of the text is made its EOS."""
    limit, checked = 29, 0
    for seed in range(4):
        tokens = random_tokens(1, 41 + 3 * seed, seed)
        pairs = [make_pair(target, drafter, [tokens], view_of(*cell), limit + 40) for cell in GRID]
        (plain,), eos = plain_tokens(pairs[0], limit), NEVER
        if ends:
            eos = frozenset({plain[11 + 4 * seed]})
            plain = plain[: next(i for i, token in enumerate(plain) if token in eos) + 1]
        ((whole,), _), S = read_prefix(target, tokens, [(tokens.shape[1], FULL)]), tokens.shape[1]
        cuts = [(S, view_of(*cell)) for cell in GRID]
        views, _ = read_prefix(drafter, tokens, cuts, guides=whole.guiding())
        if len(plain) < 2:
            continue
        logits = replay.view_logits(drafter, views, plain)
        assert all(replay.finite_views(logits))
        for pair, match in zip(pairs, replay.match_views(logits, plain), strict=True):
            for gamma in (1, 2, 3, 7, 40):
                (decoded,) = rounds_of(pair, gamma, limit, eos)
                assert replay.rounds(match, plain, gamma, limit, ends) == decoded
                checked += 1
    assert checked >= 90


@pytest.mark.slow
def test_the_whole_grid_is_decoding_round_by_round(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """3 policies × 4 budgets × 6 γ × 16 prompts of different lengths, fp32: every round of every cell."""
    limit, checked = 21, 0
    prompts = [random_tokens(1, 52 + seed, 100 + seed) for seed in range(16)]
    views = [view_of(policy, budget) for policy in POLICIES for budget in (16, 24, 32, 48)]
    kept = [read_prefix(drafter, p, [(p.shape[1], view) for view in views])[0] for p in prompts]
    texts = plain_tokens(make_pair(target, drafter, prompts, views[0], limit), limit)
    matches = [
        replay.match_views(replay.view_logits(drafter, own, text), text)
        for own, text in zip(kept, texts, strict=True)
    ]
    for number, view in enumerate(views):
        pair = make_pair(target, drafter, prompts, view, limit + 12)
        for gamma in (1, 2, 3, 5, 8, 12):
            decoded = rounds_of(pair, gamma, limit)
            for row, rounds in enumerate(decoded):
                assert replay.rounds(matches[row][number], texts[row], gamma, limit, False) == rounds
                checked += len(rounds)
    assert checked > 3 * 4 * 6 * 16 * 2


def by_hand(match: list[bool], *of: Any) -> list[tuple[int | None, int, int]]:
    """(proposed, accepted, emitted) of each round; the rounds emit the continuation, none of it twice."""
    continuation = range(len(match) + 1)
    found = replay.rounds(match, continuation, *of)
    assert [token for one in found for token in one.tokens] == list(continuation[1:])
    return [(one.proposed, one.accepted, one.emitted) for one in found]


def test_rounds_by_hand() -> None:
    yes, no = True, False
    match = [yes, yes, no, yes, no, no, yes, yes, yes]
    assert by_hand(match, 2, 10, False) == [(2, 2, 3), (2, 1, 2), (2, 0, 1), (2, 2, 3)]
    # γ reaches past what is left: the last round proposes only what is still allowed, and has no bonus.
    assert by_hand(match, 4, 10, False) == [(4, 2, 3), (4, 1, 2), (4, 0, 1), (3, 3, 3)]
    # The same tokens, but the last one is EOS with ten more allowed: nothing behind it counts.
    assert by_hand(match, 4, 20, True) == [(4, 2, 3), (4, 1, 2), (4, 0, 1), (3, 3, 3)]
    # EOS as the correction after two accepted: three positions count as proposed.
    assert by_hand([yes, yes, no], 5, 20, True) == [(3, 2, 3)]
    assert by_hand([], 3, 1, False) == []


def made(proposed: int | None, accepted: int, emitted: int) -> Round:
    return Round(tuple(range(emitted)), proposed, accepted)


def test_counts_by_hand() -> None:
    counts = Counts.of([made(3, 3, 4), made(3, 1, 2), made(2, 0, 1)], gamma=3)
    assert (counts.num_tokens, counts.num_rounds, counts.num_proposed, counts.num_accepted) == (7, 3, 8, 4)
    # Position 0 was reached by all three rounds and kept by two, position 1 by two and
    # one, position 2 by one.
    assert counts.reached == (3, 2, 1) and counts.kept == (2, 1, 1)


def test_accepted_is_the_sum_over_positions() -> None:
    match = [(7 * i) % 5 != 0 for i in range(60)]
    for gamma in range(1, 20):
        counts = Counts.of(replay.rounds(match, range(61), gamma, 61, False), gamma)
        assert sum(counts.kept) == counts.num_accepted
        assert counts.reached[0] == counts.num_rounds
        assert counts.num_tokens == 60


# ── stopping early, and sampling ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("threshold", [*(pytest.param(t, marks=pytest.mark.slow) for t in (0.2, 0.8)), 0.5])
def test_what_replay_knows_of_stopping_early_is_what_decoding_does(
    target: PreTrainedModel, drafter: PreTrainedModel, threshold: float, ends: bool
) -> None:
    """Accepted and emitted tokens of every round; proposed ones where replay claims to know them."""
    limit, known = 29, 0
    for seed in range(4):
        tokens = random_tokens(1, 41 + 3 * seed, seed)
        for cell in GRID[:4]:
            pair = make_pair(target, drafter, [tokens], view_of(*cell), limit + 9)
            (plain,), eos = plain_tokens(pair, limit), NEVER
            if ends:
                eos = frozenset({plain[11 + 4 * seed]})
                plain = plain[: next(i for i, token in enumerate(plain) if token in eos) + 1]
            (view,), _ = read_prefix(drafter, tokens, [(tokens.shape[1], view_of(*cell))])
            if len(plain) < 2:
                continue
            logits = replay.view_logits(drafter, [view], plain)
            (match,), (sure,) = replay.match_views(logits, plain), replay.confidences(logits)
            for gamma in (1, 3, 9):
                (decoded,) = rounds_of(pair, gamma, limit, eos, threshold=threshold)
                stops = [confidence < threshold for confidence in sure]
                replayed = replay.rounds(match, plain, gamma, limit, ends, stops)
                assert [one.tokens for one in replayed] == [one.tokens for one in decoded]
                for ours, one in zip(replayed, decoded, strict=True):
                    known += ours.proposed is not None
                    assert ours.accepted == one.accepted and ours.proposed in (None, one.proposed)
    assert known > 100


def test_a_cell_with_an_unknown_round_has_no_proposed_count() -> None:
    assert Counts.of([made(2, 2, 3), made(None, 1, 2)], 4).num_proposed is None
    assert Counts.of([made(2, 2, 3), made(None, 1, 2)], 4).reached == (2, 2, 0, 0)


def expected_by_recursion(chances: list[float], gamma: int, limit: int, ends: bool) -> tuple[float, ...]:
    """Rounds, proposed, accepted from token 0 on, by summing over how the first round ends."""
    total = len(chances)

    def behind(start: int) -> tuple[float, ...]:
        if start >= total:
            return (0.0, 0.0, 0.0)
        sums, alive = [0.0, 0.0, 0.0], 1.0
        outcomes = []
        span = min(gamma, total - start)
        for accepted in range(span):
            outcomes.append((alive * (1 - chances[start + accepted]), accepted))
            alive *= chances[start + accepted]
        outcomes.append((alive, span))
        for chance, accepted in outcomes:
            emitted = min(accepted + 1, total - start)
            proposed = min(gamma, limit - 1 - start)
            if ends and start + emitted == total:
                proposed = min(proposed, emitted)
            rest = behind(start + emitted)
            for i, own in enumerate((1.0, proposed, accepted)):
                sums[i] += chance * (own + rest[i])
        return tuple(sums)

    return behind(0)


@pytest.mark.parametrize("ends", [False, True])
def test_expected_counts_are_a_sum_over_all_outcomes(ends: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    chances = torch.rand(3, 9, generator=generator).double().numpy()
    for gamma in (1, 2, 4, 12):
        for row, counts in zip(chances, replay.expect(chances, gamma, 10, ends), strict=True):
            found = counts.num_rounds, counts.num_proposed, counts.num_accepted
            assert found == pytest.approx(expected_by_recursion(row.tolist(), gamma, 10, ends))
            assert counts.num_tokens == 9 and sum(counts.kept) == pytest.approx(counts.num_accepted)


def test_certain_chances_are_the_greedy_replay() -> None:
    match = [True, True, False, True, False, False, True, True, True]
    for gamma in (1, 2, 4, 9):
        for ends in (False, True):
            exact = Counts.of(replay.rounds(match, range(len(match) + 1), gamma, 10, ends), gamma)
            (expected,) = replay.expect(np.array([match], dtype=float), gamma, 10, ends)
            assert expected == exact


@torch.no_grad()
@pytest.mark.slow
def test_the_estimate_is_what_sampling_gives_on_average(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    """Texts that the target samples, against speculation that samples for itself: means within 4 standard
    errors, and a small error to begin with."""
    tokens, temperature, gamma, limit, runs = random_tokens(1, 30, 1), 1.5, 3, 9, 400
    view = view_of("streaming", 16)
    pair = make_pair(target, drafter, [tokens], view, limit + gamma)
    (kept,), _ = read_prefix(drafter, tokens, [(tokens.shape[1], view)])
    writer = decode_model(target)
    estimated, sampled = [], []
    for seed in range(runs):
        (written,) = write_ahead(writer, tokens, limit, NEVER, Chance(temperature, seed).sampler(["p"]))
        text, log_probs = [one.token for one in written], [one.log_prob for one in written]
        logits = replay.view_logits(drafter, [kept], text)
        chances = replay.chances(logits, text, log_probs, temperature)
        (counts,) = replay.expect(chances, gamma, limit, False)
        estimated.append((counts.num_rounds, counts.num_accepted))
        sampler = Chance(temperature, 10_000 + seed).sampler(["p"])
        pair.firsts[:] = sampler.choose(first_logits(target, tokens)).tolist()
        (rounds,) = rounds_of(pair, gamma, limit, sampler=sampler)
        sampled.append((len(rounds), sum(one.accepted for one in rounds)))
    ours, theirs = np.array(estimated, dtype=float), np.array(sampled, dtype=float)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / runs)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert (error < 0.05 * theirs.mean(0)).all()
    assert (ours.std(0) < theirs.std(0)).all(), "what is summed over need not be drawn"


def first_logits(target: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return read_prefix(target, tokens, [])[1]
