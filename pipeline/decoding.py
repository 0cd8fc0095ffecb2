"""Autoregressive and speculative decoding, as loops over the steps of `steps.py`.

A side is a model with its cache; the target's view is full, the drafter's sparse. The prefix fills positions
0..S-1; continuation token t sits at position S+t. Token 0 is what the target's prefill gives. The loops are
iterators, so that a caller can stream, count or time them; they decode one or several prompts at once. The
host learns of a round in one transfer; where drafting stops early, also of each proposal's confidence.

Shape legend: B rows, one a prompt; T proposals of a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.steps import Rule, Side


class NotFinite(ArithmeticError):
    """A model gave NaN or infinite logits."""


@dataclass(frozen=True)
class Round:
    """One draft → verify → accept cycle.

    `tokens` are the emitted ones. Proposals that lie behind an EOS count neither as proposed nor accepted.
    """

    tokens: tuple[int, ...]
    proposed: int
    accepted: int


def fold(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class Sampler:
    """A rule, and the random numbers of each row when it samples."""

    rule: Rule
    generators: tuple[torch.Generator, ...] = ()

    @classmethod
    def seeded(cls, temperature: float, seeds: Sequence[int], device: torch.device | str = "cpu") -> Sampler:
        """One seed for each row; what a row draws does not depend on the others."""
        if temperature == 0:
            return GREEDY
        return cls(Rule(temperature), tuple(torch.Generator(device).manual_seed(seed) for seed in seeds))

    def uniforms(self, count: int, by_row: bool = True) -> Tensor | None:
        """The next numbers in [0, 1) of each row, [B, count] or [count, B]; greedy decoding needs none."""
        if not self.generators:
            return None
        rows = [torch.rand(count, generator=g, device=g.device) for g in self.generators]
        return torch.stack(rows, 0 if by_row else 1)

    def choose(self, logits_BV: Tensor) -> Tensor:
        """One token per row, [B]."""
        uniforms_B1 = self.uniforms(1)
        return self.rule.choose(logits_BV, None if uniforms_B1 is None else uniforms_B1[:, 0])[0]


GREEDY = Sampler(Rule())


@torch.no_grad()
def autoregressive(
    target: Side, firsts: Sequence[int], limit: int, eos: frozenset[int], sampler: Sampler
) -> Iterator[list[int | None]]:
    """Yield the tokens after `firsts`, one step at a time, up to `limit` tokens in all or EOS.

    Each step gives the next token of every row; None for a row that has ended.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    check_room(target, limit)
    token_B1, step_B = start(target, firsts)
    open_rows = [limit > 1 and first not in eos for first in firsts]
    count = 1
    while any(open_rows):
        token_B1, step_B, told_B2 = target.advance(sampler.rule, token_B1, step_B, sampler.uniforms(1))
        count += 1
        emitted: list[int | None] = []
        for row, (token, finite) in enumerate(told_B2.tolist()):
            emitted.append(token if open_rows[row] else None)
            if open_rows[row] and not finite:
                raise NotFinite(f"{target.model.name}: logits not finite at continuation token {count - 1}")
            open_rows[row] = open_rows[row] and count < limit and token not in eos
        yield emitted


@torch.no_grad()
def speculate(
    target: Side,
    drafter: Side,
    firsts: Sequence[int],
    gamma: int,
    limit: int,
    eos: frozenset[int],
    sampler: Sampler,
    threshold: float = 0.0,
) -> Iterator[list[Round | None]]:
    """Yield rounds until each row has `limit` tokens, its first included, or has emitted EOS.

    Each round gives one `Round` of every row; None for a row that has ended. Rows accept on their own. Greedy
    rounds emit the tokens of `autoregressive`; sampled ones are distributed as the target's.

    Args:
        gamma: proposals of a round; the most of them where `threshold` stops earlier.
        threshold: stop drafting behind a proposal that the drafter gives less probability than this. The
            proposal itself is still verified: dropping it would favour the likely ones. Above 0 the host asks
            after every proposal.

    Raises:
        NotFinite: if a logit of either model is NaN or infinite.
    """
    check_room(target, limit + gamma)
    check_room(drafter, limit + gamma)
    unread, step_B = start(target, firsts)
    pair_B2 = torch.cat([unread, unread], 1)
    counts = [1] * len(firsts)
    open_rows = [limit > 1 and first not in eos for first in firsts]
    all_lengths, all_B = [gamma] * len(firsts), torch.full_like(step_B, gamma)
    while any(open_rows):
        begin = unread, step_B - (unread.shape[1] - 1), sampler.uniforms(gamma, by_row=False)
        if threshold > 0:
            draft_BT, best_BT, q_BTV, lengths = draft_until(drafter, sampler, threshold, gamma, *begin)
            lengths_B = torch.tensor(lengths, device=step_B.device)
        else:
            draft_BT, best_BT, q_BTV = drafter.draft(sampler.rule, gamma, *begin)
            lengths, lengths_B = all_lengths, all_B
        uniforms_BT1 = sampler.uniforms(gamma + 1)
        if uniforms_BT1 is not None:  # a row's numbers are the same however many the round proposes
            uniforms_BT1 = torch.cat([uniforms_BT1[:, : draft_BT.shape[1]], uniforms_BT1[:, -1:]], 1)
        told_BR, pair_B2, step_B = target.verify(
            sampler.rule, pair_B2, draft_BT, step_B, best_BT, q_BTV, uniforms_BT1, lengths_B
        )
        # The drafter has never read its last proposal, nor what came after it; reading one token twice is
        # cheaper than asking which rows accepted everything.
        unread = pair_B2
        told = told_BR.tolist()  # the round's one transfer
        rounds: list[Round | None] = []
        for row, (accepted, target_finite, drafter_finite, *tokens) in enumerate(told):
            if not open_rows[row]:
                rounds.append(None)
                continue
            if not (target_finite and drafter_finite):
                side = drafter if target_finite else target
                raise NotFinite(f"{side.model.name}: logits not finite near continuation token {counts[row]}")
            allowed = limit - counts[row]
            emitted = until_eos(tokens[: accepted + 1], eos)[:allowed]
            ended = emitted[-1] in eos
            proposed = min(lengths[row], allowed, len(emitted) if ended else gamma)
            rounds.append(Round(tuple(emitted), proposed, min(accepted, len(emitted))))
            counts[row] += len(emitted)
            open_rows[row] = counts[row] < limit and not ended
        if not all(open_rows):  # a row that has ended idles at the beginning of its room
            step_B = step_B.where(torch.tensor(open_rows, device=step_B.device), 1)
        yield rounds


def draft_until(
    drafter: Side,
    sampler: Sampler,
    threshold: float,
    gamma: int,
    tokens_BQ: Tensor,
    step_B: Tensor,
    uniforms_TB: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    """Draft until every row has come to a proposal of less confidence than `threshold`, or to γ.

    Returns:
        What `draft` gives, padded to a power of two or γ so that verification has few shapes, and the number
        of proposals of each row.
    """
    tokens: list[Tensor] = []
    bests: list[Tensor] = []
    probabilities: list[Tensor] = []
    lengths = [0] * tokens_BQ.shape[0]
    drafting = [True] * len(lengths)
    while any(drafting):
        uniform_B = None if uniforms_TB is None else uniforms_TB[len(tokens)]
        tokens_BQ, step_B, best_B, q_BV, confidence_B = drafter.propose_surely(
            sampler.rule, tokens_BQ, step_B, uniform_B
        )
        tokens.append(tokens_BQ)
        bests.append(best_B)
        probabilities += [] if q_BV is None else [q_BV]
        for row, confidence in enumerate(confidence_B.tolist()):
            lengths[row] += drafting[row]
            drafting[row] = drafting[row] and len(tokens) < gamma and not confidence < threshold
    count = min(gamma, 1 << (len(tokens) - 1).bit_length())
    padding = count - len(tokens)
    tokens += tokens[-1:] * padding
    bests += bests[-1:] * padding
    probabilities += probabilities[-1:] * padding
    q_BTV = torch.stack(probabilities, 1) if probabilities else None
    return torch.cat(tokens, 1), torch.stack(bests, 1), q_BTV, lengths


def start(side: Side, firsts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first tokens [B, 1], and their number in the continuation [B]: 0."""
    if len(firsts) != side.cache.rows:
        raise ValueError(f"the cache has {side.cache.rows} rows, not {len(firsts)}")
    first_B1 = torch.tensor(firsts, device=side.cache.kept_B.device).unsqueeze(1)
    return first_B1, torch.zeros_like(side.cache.kept_B)


def check_room(side: Side, needed: int) -> None:
    if side.cache.room < needed:
        raise ValueError(f"the cache has room for {side.cache.room} continuation tokens, not {needed}")


def until_eos(tokens: list[int], eos: frozenset[int]) -> list[int]:
    """The tokens up to and including the first that ends the text."""
    for index, token in enumerate(tokens):
        if token in eos:
            return tokens[: index + 1]
    return tokens
