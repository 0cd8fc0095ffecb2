"""Replay against decoding, round by round, and against counts done by hand."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from pipeline import replay
from pipeline.kv import read_prefix, view_of
from tests.conftest import random_tokens
from tests.pairs import NEVER, make_pair, plain_tokens, rounds_of

GRID = [("chunk_topk", 16), ("chunk_topk", 32), ("streaming", 16), ("snapkv", 24), ("none", 0), ("x", "full")]


@pytest.mark.parametrize("ends", [False, True])
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
        views, _ = read_prefix(drafter, tokens, [(tokens.shape[1], view_of(*cell)) for cell in GRID])
        if len(plain) < 2:
            continue
        logits = replay.view_logits(drafter, views, plain)
        assert all(replay.finite_views(logits))
        for pair, match in zip(pairs, replay.match_views(logits, plain), strict=True):
            for gamma in (1, 2, 3, 7, 40):
                (decoded,) = rounds_of(pair, gamma, limit, eos)
                decoded_rounds = [(one.proposed, one.accepted, len(one.tokens)) for one in decoded]
                assert replay.rounds(match, gamma, limit, ends) == decoded_rounds
                checked += 1
    assert checked >= 90


def test_rounds_by_hand() -> None:
    yes, no = True, False
    match = [yes, yes, no, yes, no, no, yes, yes, yes]
    assert replay.rounds(match, 2, 10, False) == [(2, 2, 3), (2, 1, 2), (2, 0, 1), (2, 2, 3)]
    # γ reaches past what is left: the last round proposes only what is still allowed, and has no bonus.
    assert replay.rounds(match, 4, 10, False) == [(4, 2, 3), (4, 1, 2), (4, 0, 1), (3, 3, 3)]
    # The same tokens, but the last one is EOS with ten more allowed: nothing behind it counts.
    assert replay.rounds(match, 4, 20, True) == [(4, 2, 3), (4, 1, 2), (4, 0, 1), (3, 3, 3)]
    # EOS as the correction after two accepted: three positions count as proposed.
    assert replay.rounds([yes, yes, no], 5, 20, True) == [(3, 2, 3)]
    assert replay.rounds([], 3, 1, False) == []


def test_counts_by_hand() -> None:
    counts = replay.count([(3, 3, 4), (3, 1, 2), (2, 0, 1)], gamma=3)
    assert (counts.num_tokens, counts.num_rounds, counts.num_proposed, counts.num_accepted) == (7, 3, 8, 4)
    # Position 0 was reached by all three rounds and kept by two, position 1 by two and
    # one, position 2 by one.
    assert counts.reached == (3, 2, 1) and counts.kept == (2, 1, 1)


def test_accepted_is_the_sum_over_positions() -> None:
    match = [(7 * i) % 5 != 0 for i in range(60)]
    for gamma in range(1, 20):
        counts = replay.count(replay.rounds(match, gamma, 61, False), gamma)
        assert sum(counts.kept) == counts.num_accepted
        assert counts.reached[0] == counts.num_rounds
        assert counts.num_tokens == 60
