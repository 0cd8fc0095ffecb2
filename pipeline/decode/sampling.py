"""Greedy or sampled: how a token is drawn, and which seed draws it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import dispatch, reference
from kernels.dispatch import Backend
from pipeline.decode.dropmatch import DropMatch


def fold(*numbers: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen and proposals accepted: by the arg-max at temperature 0, else by sampling.

    With `dropmatch`, which is greedy and lossy, that decides which proposals stand.
    """

    temperature: float = 0.0
    never: tuple[int, ...] = ()  # tokens that are never chosen
    dropmatch: DropMatch | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits, with those of the tokens in `never` at -inf."""
        if not self.never:
            return logits
        return logits.index_fill(-1, torch.tensor(self.never, device=logits.device), -torch.inf)

    def probabilities(self, logits: Tensor) -> Tensor:
        return (logits.float() / self.temperature).softmax(-1)

    def choose(self, logits_BV: Tensor, uniform_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """A token per row [B], the best logit [B], and when sampling the probabilities [B, V] drawn from.

        A logit of NaN or +inf shows in the best one.
        """
        logits_BV = self.allowed(logits_BV)
        best_B, token_B = logits_BV.max(-1)
        if self.greedy:
            return token_B, best_B, None
        assert uniform_B is not None
        q_BV = self.probabilities(logits_BV)
        return reference.draw(q_BV, uniform_B).clamp_min(0), best_B, q_BV

    def accept(
        self,
        draft_BT: Tensor,
        q_BTV: Tensor | None,
        logits_BT1V: Tensor,
        uniforms_BT1: Tensor | None,
        lengths_B: Tensor,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """Accepted proposals [B] of each round, and the target's token after them [B]."""
        if self.greedy:
            return dispatch.greedy_accept(draft_BT, logits_BT1V.argmax(-1), lengths_B, backend)
        assert q_BTV is not None and uniforms_BT1 is not None
        p_BT1V = self.probabilities(logits_BT1V)
        return dispatch.rejection_accept(draft_BT, q_BTV, p_BT1V, uniforms_BT1, lengths_B, backend)


@dataclass
class Sampler:
    """A rule, and the random numbers of each row when it samples."""

    rule: Rule
    generators: tuple[torch.Generator, ...] = ()

    @classmethod
    def seeded(
        cls,
        temperature: float,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        never: tuple[int, ...] = (),
    ) -> Sampler:
        """One seed for each row; what a row draws does not depend on the others."""
        if temperature == 0:
            return cls(Rule(never=never))
        return cls(
            Rule(temperature, never), tuple(torch.Generator(device).manual_seed(seed) for seed in seeds)
        )

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


@dataclass(frozen=True)
class Chance:
    """How a run samples. Runs of one prompt and chance draw the same numbers, other prompts draw others."""

    temperature: float
    seed: int
    dropmatch: DropMatch | None = None

    def sampler(self, prompt_ids: Sequence[str], device: torch.device | str = "cpu") -> Sampler:
        """One row for each prompt."""
        if self.dropmatch:
            return Sampler(Rule(dropmatch=self.dropmatch))
        seeds = [fold(self.seed, zlib.crc32(prompt_id.encode())) for prompt_id in prompt_ids]
        return Sampler.seeded(self.temperature, seeds, device)


GREEDILY = Chance(0.0, 0)
