"""Autoregressive and speculative decoding, as loops over the steps of `steps.py`.

The target is a model with its cache; its view is full. Proposals come from a source, mostly a drafter behind
a sparse view. The prefix fills positions 0..S-1; continuation token t sits at position S+t. Token 0 is what
the target's prefill gives. The loops are iterators, so that a caller can stream, count or time them; they
decode one or several prompts at once. The host learns of a round in one transfer, unless a source needs more.

Shape legend: B rows, one a prompt; T proposals of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.decode.runner import Runner
from pipeline.decode.sampling import Sampler
from pipeline.decode.sources import DraftSource
from pipeline.errors import NotFinite
from pipeline.metrics import Round, counted_proposals


class Noted(NamedTuple):
    """A token that the target chose, its top-1 minus top-2 logit, and its log-probability (0 when greedy)."""

    token: int
    gap: float
    log_prob: float


def autoregressive(
    target: Runner, firsts: Sequence[int], limit: int, eos: frozenset[int], sampler: Sampler
) -> Iterator[list[int | None]]:
    """Yield the tokens after `firsts`, one step at a time, up to `limit` tokens in all or EOS.

    Each step gives the next token of every row; None for a row that has ended.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    for reports in _walk(target, target.advance, firsts, limit, eos, sampler):
        yield [None if report is None else report[0] for report in reports]


def autoregressive_noted(
    target: Runner, firsts: Sequence[int], limit: int, eos: frozenset[int], sampler: Sampler
) -> Iterator[list[Noted | None]]:
    """As `autoregressive`, with each token's logit gap and log-probability: another pass over the logits."""
    for reports in _walk(target, target.advance_noted, firsts, limit, eos, sampler):
        yield [None if report is None else Noted(int(report[0]), report[2], report[3]) for report in reports]


@torch.no_grad()
def _walk(
    target: Runner,
    advance: Callable[..., Any],
    firsts: Sequence[int],
    limit: int,
    eos: frozenset[int],
    sampler: Sampler,
) -> Iterator[list[list[Any] | None]]:
    """The autoregressive loop: each step's report on every row, which begins with token and finiteness."""
    target.cache.check_room(limit)
    token_B1, step_B = start(target, firsts)
    open_rows = [limit > 1 and first not in eos for first in firsts]
    count = 1
    while any(open_rows):
        token_B1, step_B, report_BR = advance(sampler.rule, token_B1, step_B, sampler.uniforms(1))
        count += 1
        reports = [
            report if is_open else None for report, is_open in zip(report_BR.tolist(), open_rows, strict=True)
        ]
        for row, report in enumerate(reports):
            if report is not None and not report[1]:
                raise NotFinite(f"{target.model.name}: logits not finite at continuation token {count - 1}")
            open_rows[row] = report is not None and count < limit and report[0] not in eos
        yield reports


@torch.no_grad()
def speculate(
    target: Runner,
    source: DraftSource,
    firsts: Sequence[int],
    gamma: int,
    limit: int,
    eos: frozenset[int],
    sampler: Sampler,
) -> Iterator[list[Round | None]]:
    """Yield rounds until each row has `limit` tokens, its first included, or has emitted EOS.

    Each round gives one `Round` of every row; None for a row that has ended. Rows accept independently.
    Greedy rounds emit the tokens of `autoregressive`; sampled ones are distributed as the target's. With
    `Rule.dropmatch` neither holds.

    Args:
        gamma: most proposals of a round; a source may have fewer.

    Raises:
        NotFinite: if a logit of either model is NaN or infinite.
    """
    target.cache.check_room(limit + gamma)
    source.check_room(limit + gamma)
    unread, step_B = start(target, firsts)
    pair_B2 = torch.cat([unread, unread], 1)  # the last two tokens; at the start both are the first
    counts = [1] * len(firsts)
    open_rows = [limit > 1 and first not in eos for first in firsts]
    all_lengths, all_B = [gamma] * len(firsts), torch.full_like(step_B, gamma)
    while any(open_rows):
        offer = source.propose(sampler, gamma, unread, step_B - (unread.shape[1] - 1), open_rows)
        lengths, lengths_B = all_lengths, all_B
        if offer.lengths is not None:
            lengths, lengths_B = offer.lengths, torch.tensor(offer.lengths, device=step_B.device)
        uniforms_BT1 = sampler.uniforms(gamma + 1)
        if uniforms_BT1 is not None:  # a row's numbers are the same however many the round proposes
            count = offer.tokens_BT.shape[1]
            uniforms_BT1 = torch.cat([uniforms_BT1[:, :count], uniforms_BT1[:, -1:]], 1)
        report_BR, pair_B2, next_B, features = target.verify(
            sampler.rule,
            pair_B2,
            offer.tokens_BT,
            step_B,
            offer.best_BT,
            offer.probabilities_BTV,
            uniforms_BT1,
            lengths_B,
        )
        source.observe(report_BR, features, step_B)
        step_B = next_B
        # The drafter has never read its last proposal, nor what came after it; reading one token twice is
        # cheaper than asking which rows accepted everything.
        unread = pair_B2
        reports = report_BR.tolist()  # the round's one transfer
        rounds: list[Round | None] = []
        for row, (accepted, target_finite, drafter_finite, *tokens) in enumerate(reports):
            if not open_rows[row]:
                rounds.append(None)
                continue
            if not (target_finite and drafter_finite):
                name = source.name if target_finite else target.model.name
                raise NotFinite(f"{name}: logits not finite near continuation token {counts[row]}")
            allowed = limit - counts[row]
            emitted = until_eos(tokens[: accepted + 1], eos)[:allowed]
            ended = emitted[-1] in eos
            proposed = counted_proposals(lengths[row], allowed, len(emitted), ended)
            rounds.append(Round(tuple(emitted), proposed, min(accepted, len(emitted))))
            counts[row] += len(emitted)
            open_rows[row] = counts[row] < limit and not ended
        if not all(open_rows):  # a row that has ended idles at the beginning of its room
            step_B = step_B.where(torch.tensor(open_rows, device=step_B.device), 1)
        yield rounds


def start(runner: Runner, firsts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first tokens [B, 1], and their number in the continuation [B]: 0."""
    if len(firsts) != runner.cache.rows:
        raise ValueError(f"the cache has {runner.cache.rows} rows, not {len(firsts)}")
    first_B1 = torch.tensor(firsts, device=runner.cache.kept_B.device).unsqueeze(1)
    return first_B1, torch.zeros_like(runner.cache.kept_B)


def until_eos(tokens: list[int], eos: frozenset[int]) -> list[int]:
    """The tokens up to and including the first that ends the text."""
    for index, token in enumerate(tokens):
        if token in eos:
            return tokens[: index + 1]
    return tokens
