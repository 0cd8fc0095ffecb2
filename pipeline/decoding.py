"""Autoregressive and speculative decoding as plain loops over caches.

Target and drafter hold the same kind of cache: the target's view is full, the drafter's is sparse. The
prefix fills positions 0..S-1; continuation token t sits at position S+t. `tokens[0]` is what the target's
prefill gives. Both loops are iterators, so that a caller can stream, count or time them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import reference
from pipeline.kv import ViewCache, read_continuation


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
    """How tokens are chosen: the arg-max at temperature 0, else a draw from softmax(logits / temperature)."""

    temperature: float = 0.0
    generator: torch.Generator | None = None

    @classmethod
    def seeded(cls, temperature: float, seed: int, device: torch.device | str = "cpu") -> Sampler:
        return cls(temperature, torch.Generator(device).manual_seed(seed) if temperature > 0 else None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.temperature).softmax(-1)

    def choose(self, logits_BV: Tensor) -> Tensor:
        """One token per row, [B]."""
        if self.greedy:
            return logits_BV.argmax(-1)
        return torch.multinomial(self.probabilities(logits_BV), 1, generator=self.generator).squeeze(-1)


def next_logits(model: PreTrainedModel, cache: ViewCache, tokens: Sequence[int], position: int) -> Tensor:
    """Logits [Q, V] after each of Q tokens that start at `position`; their KV are appended to the cache.

    Raises:
        NotFinite: if one of them is NaN or infinite.
    """
    device = model.device
    ids_1Q = torch.tensor([tokens], device=device)
    positions_1Q = torch.arange(position, position + len(tokens), device=device).unsqueeze(0)
    logits_QV = read_continuation(model, cache, ids_1Q, positions_1Q)[0]
    if not torch.isfinite(logits_QV).all():
        raise NotFinite(f"{model.name_or_path or type(model).__name__}: logits not finite at {position}")
    return logits_QV


@torch.inference_mode()
def autoregressive(
    target: PreTrainedModel,
    cache: ViewCache,
    prefix_tokens: int,
    first: int,
    limit: int,
    eos: frozenset[int],
    sampler: Sampler,
) -> Iterator[int]:
    """Yield the continuation after `first`, one token a step, up to `limit` tokens in all or EOS."""
    token, count = first, 1
    while count < limit and token not in eos:
        logits_1V = next_logits(target, cache, [token], prefix_tokens + count - 1)
        token = int(sampler.choose(logits_1V))
        count += 1
        yield token


@torch.inference_mode()
def speculate(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    target_cache: ViewCache,
    drafter_cache: ViewCache,
    prefix_tokens: int,
    first: int,
    gamma: int,
    limit: int,
    eos: frozenset[int],
    sampler: Sampler,
) -> Iterator[Round]:
    """Yield rounds until `limit` tokens, `first` included, are there or EOS is emitted.

    Greedy rounds emit the tokens of `autoregressive`; sampled ones are distributed as the target's. Both
    caches hold no continuation token yet and have room for `limit + gamma`.
    """
    tokens = [first]
    while len(tokens) < limit and tokens[-1] not in eos:
        allowed = limit - len(tokens)
        proposals, q_TV = draft(drafter, drafter_cache, tokens, prefix_tokens, min(gamma, allowed), sampler)
        logits_T1V = verify(target, target_cache, tokens, proposals, prefix_tokens)
        accepted, following = accept(proposals, q_TV, logits_T1V, sampler)
        emitted = until_eos([*proposals[:accepted], following], eos)[:allowed]
        tokens += emitted
        for cache in (target_cache, drafter_cache):
            cache.rollback(max(0, cache.appended - (len(tokens) - 1)))
        proposed = min(len(proposals), len(emitted)) if tokens[-1] in eos else len(proposals)
        yield Round(tuple(emitted), proposed, min(accepted, len(emitted)))


def draft(
    drafter: PreTrainedModel,
    cache: ViewCache,
    tokens: Sequence[int],
    prefix_tokens: int,
    count: int,
    sampler: Sampler,
) -> tuple[list[int], Tensor | None]:
    """Propose `count` tokens after `tokens`; reads first what the cache lacks of them (one or two tokens).

    Returns:
        The proposals and, when sampling, the probabilities [count, V] that they were drawn from.
    """
    unread = list(tokens[cache.appended :])
    proposals: list[int] = []
    rows = []
    for _ in range(count):
        logits_1V = next_logits(drafter, cache, unread, prefix_tokens + cache.appended)[-1:]
        proposals.append(int(sampler.choose(logits_1V)))
        if not sampler.greedy:
            rows.append(sampler.probabilities(logits_1V))
        unread = proposals[-1:]
    return proposals, torch.cat(rows) if rows else None


def verify(
    target: PreTrainedModel,
    cache: ViewCache,
    tokens: Sequence[int],
    proposals: Sequence[int],
    prefix_tokens: int,
) -> Tensor:
    """The target's logits [T + 1, V] before each of T proposals and after the last, in one pass."""
    return next_logits(target, cache, [tokens[-1], *proposals], prefix_tokens + len(tokens) - 1)


def accept(
    proposals: Sequence[int], q_TV: Tensor | None, logits_T1V: Tensor, sampler: Sampler
) -> tuple[int, int]:
    """Accepted proposals of one round, and the target's token after them (correction or bonus)."""
    draft_T = torch.tensor(proposals, device=logits_T1V.device)
    if q_TV is None:
        target_T1 = logits_T1V.argmax(-1)
        accepted = int(reference.greedy_accept(draft_T, target_T1))
        return accepted, int(target_T1[accepted])
    return reference.rejection_accept(draft_T, q_TV, sampler.probabilities(logits_T1V), sampler.generator)


def until_eos(tokens: list[int], eos: frozenset[int]) -> list[int]:
    """The tokens up to and including the first that ends the text."""
    for index, token in enumerate(tokens):
        if token in eos:
            return tokens[: index + 1]
    return tokens
