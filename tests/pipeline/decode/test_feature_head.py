"""Decoding with a head: text, law and rounds against autoregressive decoding, and replay against decoding."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chi2_contingency
from transformers import PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode import replay
from pipeline.decode.chain_replay import tell_chains
from pipeline.decode.loop import autoregressive_noted
from pipeline.decode.model import decode_model
from pipeline.decode.sampling import Chance
from pipeline.kv.views import view_of
from pipeline.metrics import Counts
from pipeline.models.heads.eagle import FeatureHead
from tests.helpers.feature_heads import OPTIONS, head_pair, prompt, six_layers, trained_head
from tests.helpers.pairs import NEVER, plain_tokens, rounds_of, tokens_of

GRID: list[tuple[Any, ...]] = [
    ("full", "full"),
    ("none", 0),
    ("window", 16),
    ("window", 24, 4),
    ("streaming", 16),
    ("target_guided", 16),
    ("chunk_topk", 24),
    ("snapkv", 16, 0, "rebased"),
]
GAMMAS = (1, 2, 4, 9)
PROMPTS = [prompt(length, length) for length in (45, 41, 44, 49)]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return six_layers(1)


@pytest.fixture(scope="module", params=OPTIONS, ids=lambda options: "-".join(options) or "eagle3")
def head(request: pytest.FixtureRequest, target: PreTrainedModel) -> FeatureHead:
    return trained_head(target, PROMPTS, **request.param)


@pytest.fixture(scope="module")
def new_head(target: PreTrainedModel) -> FeatureHead:
    """Of 3.1's form, for what does not depend on the form."""
    return trained_head(target, PROMPTS, **OPTIONS[1])


@torch.no_grad()
def test_text_is_autoregressive_and_replay_is_decoding_round_by_round(
    target: PreTrainedModel, head: FeatureHead
) -> None:
    limit, accepted, checked = 33, 0, 0
    for seed, ends in enumerate([False, True]):
        tokens = PROMPTS[seed]
        pairs = [head_pair(target, head, [tokens], view_of(*cell), limit + 12) for cell in GRID]
        (plain,), eos = plain_tokens(pairs[0].pair, limit), NEVER
        if ends:
            eos = frozenset({plain[13 + 5 * seed]})
            plain = plain[: next(i for i, token in enumerate(plain) if token in eos) + 1]
        if len(plain) < 2:
            continue
        large = decode_model(target)
        large.feature_layers = tuple(head.config.feature_layers)
        _, _, features = large.read(torch.cat([tokens, torch.tensor([plain[:-1]])], 1), [])
        assert features is not None
        (whole,), _ = large.prefill(tokens, [(tokens.shape[1], FULL)])
        cuts = [(tokens.shape[1], view_of(*cell)) for cell in GRID]
        kept = head.prefix(tokens, features[:, : tokens.shape[1]], cuts, whole.guiding())
        told = tell_chains(head, kept, plain, features[0, tokens.shape[1] - 1 : -1], max(GAMMAS))
        assert all(told.finite)
        for both, match in zip(pairs, told.match, strict=True):
            for gamma in GAMMAS:
                (decoded,) = rounds_of(both.pair, gamma, limit, eos, source=both.source())
                assert [plain[0], *(t for r in decoded for t in r.tokens)] == plain
                assert replay.rounds(match, plain, gamma, limit, ends) == decoded
                accepted += sum(one.accepted for one in decoded)
                checked += len(decoded)
    assert checked > 100 and accepted > checked / 2, (accepted, checked)


@torch.no_grad()
def test_rows_accept_one_by_one(target: PreTrainedModel, new_head: FeatureHead) -> None:
    """Prompts of several lengths together are each as alone, also where some end early."""
    prompts, view, limit = PROMPTS, View("streaming", 16), 30
    together = head_pair(target, new_head, prompts, view, limit + 5)
    texts = plain_tokens(together.pair, limit)
    eos = frozenset({texts[0][6], texts[2][14]})
    rows = rounds_of(together.pair, 4, limit, eos, source=together.source())
    for row, one in enumerate(prompts):
        alone = head_pair(target, new_head, [one], view, limit + 5)
        assert rounds_of(alone.pair, 4, limit, eos, source=alone.source()) == [rows[row]]


@torch.no_grad()
def test_a_source_that_is_used_again_begins_anew(target: PreTrainedModel, new_head: FeatureHead) -> None:
    both = head_pair(target, new_head, PROMPTS[:2], View("streaming", 16), 30)
    source = both.source()
    first, again = (rounds_of(both.pair, 4, 24, source=source) for _ in range(2))
    assert first == again == rounds_of(both.pair, 4, 24, source=both.source())


@torch.no_grad()
@pytest.mark.slow
def test_compiled_steps_are_the_plain_ones(target: PreTrainedModel) -> None:
    view, limit = View("streaming", 16), 24
    with torch.enable_grad():
        head = trained_head(target, PROMPTS)
    plain = head_pair(target, head, PROMPTS[:2], view, limit + 4)
    compiled = head_pair(target, head, PROMPTS[:2], view, limit + 4, "inductor")
    for gamma in (1, 3):
        rounds, others = (
            rounds_of(both.pair, gamma, limit, source=both.source()) for both in (plain, compiled)
        )
        assert rounds == others


@torch.no_grad()
def test_drafting_that_stops_when_unsure(target: PreTrainedModel, new_head: FeatureHead) -> None:
    limit, lengths = 30, set()
    tokens, view = PROMPTS[3], View("chunk_topk", 16)
    both = head_pair(target, new_head, [tokens], view, limit + 6)
    (plain,) = plain_tokens(both.pair, limit)
    for threshold in (0.0, 0.3, 0.7, 0.99):
        (rounds,) = rounds_of(both.pair, 6, limit, source=both.source(threshold))
        assert tokens_of(both.pair, [rounds]) == [plain]
        lengths.add(tuple(one.proposed for one in rounds))
        large = both.pair.target.model
        _, _, features = large.read(torch.cat([tokens, torch.tensor([plain[:-1]])], 1), [])
        assert features is not None
        kept = new_head.prefix(tokens, features[:, :49], [(49, view)])
        told = tell_chains(new_head, kept, plain, features[0, 48:-1], 6, surely=True)
        stops = [[sure < threshold for sure in chain] for chain in told.sure[0]]
        replayed = replay.rounds(told.match[0], plain, 6, limit, False, stops if threshold else None)
        for ours, theirs in zip(replayed, rounds, strict=True):
            assert (ours.tokens, ours.accepted) == (theirs.tokens, theirs.accepted)
            assert ours.proposed in (None, theirs.proposed)
    assert len(lengths) > 2


@torch.no_grad()
def test_sampling_has_the_targets_law(target: PreTrainedModel, new_head: FeatureHead) -> None:
    """The first three tokens of many samples, with speculation and without: a chi-square test of the second
    and third, at one part in ten thousand."""
    count, rows, limit = 1800, 300, 4
    tokens, view = PROMPTS[2], View("streaming", 16)
    both = head_pair(target, new_head, [tokens] * rows, view, limit + 3)
    seen: dict[str, Counter[tuple[int, ...]]] = {"plain": Counter(), "drafted": Counter()}
    firsts = both.pair.firsts
    for turn in range(count // rows):
        for kind, counts in seen.items():
            ids = [f"{kind}-{turn}-{row}" for row in range(rows)]
            sampler = Chance(0.6, 3).sampler(ids)
            if kind == "plain":
                texts = plain_tokens(both.pair, limit, sampler=sampler)
            else:
                rounds = rounds_of(both.pair, 3, limit, sampler=sampler, source=both.source())
                texts = tokens_of(both.pair, rounds)
                assert any(one.accepted for row in rounds for one in row)
            counts.update(tuple(text[1:3]) for text in texts)
    assert set(firsts) == {firsts[0]}
    common = [pair for pair, n in (seen["plain"] + seen["drafted"]).items() if n >= 20]
    table = [[seen[kind][pair] for pair in common] for kind in seen]
    for row, kind in zip(table, seen, strict=True):
        row.append(seen[kind].total() - sum(row))
    assert len(common) >= 5
    assert chi2_contingency(table).pvalue > 1e-4


@torch.no_grad()
def test_expected_rounds_of_samples_are_their_means(target: PreTrainedModel, new_head: FeatureHead) -> None:
    """Replay's estimate over sampled texts against decoding that samples: tokens a round, within 6 %."""
    rows, limit, gamma, tokens, view = 200, 20, 3, PROMPTS[2], View("streaming", 16)
    both = head_pair(target, new_head, [tokens] * rows, view, limit + gamma)
    sampler = Chance(0.7, 1).sampler([str(row) for row in range(rows)])
    rounds = rounds_of(both.pair, gamma, limit, sampler=sampler, source=both.source())
    decoded = Counts.pooled([Counts.of(row, gamma) for row in rounds])

    large, firsts = both.pair.target.model, both.pair.firsts
    sampler = Chance(0.7, 2).sampler([f"t{row}" for row in range(rows)])
    steps = list(autoregressive_noted(both.pair.target, firsts, limit, NEVER, sampler))
    expected = []
    for first, *column in list(zip(firsts, *steps, strict=True))[:60]:
        text = [first, *(noted.token for noted in column)]
        _, _, features = large.read(torch.cat([tokens, torch.tensor([text[:-1]])], 1), [])
        assert features is not None
        kept = new_head.prefix(tokens, features[:, :44], [(44, view)])
        log_probs = [0.0, *(noted.log_prob for noted in column)]
        told = tell_chains(new_head, kept, text, features[0, 43:-1], gamma, 0.7, log_probs)
        assert told.chances is not None
        expected += replay.expect(told.chances, gamma, limit, False)
    pooled = Counts.pooled(expected)
    assert pooled.tau == pytest.approx(decoded.tau, rel=0.06)
