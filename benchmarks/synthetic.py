"""Synthetic acceptance: what a system would gain from a drafter with a given acceptance.

Each proposal is accepted with probability α, whatever its token; models, caches and passes are the real ones.
Serving systems give upper bounds by this convention. The text that comes out means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import Backend
from pipeline.decode.sampling import Rule, Sampler


@dataclass(frozen=True)
class Synthetic(Rule):
    """Greedy choice of tokens; acceptance by a coin."""

    alpha: float = 0.0

    def accept(
        self,
        draft_BT: Tensor,
        q_BTV: Tensor | None,
        logits_BT1V: Tensor,
        uniforms_BT1: Tensor | None,
        lengths_B: Tensor,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        assert uniforms_BT1 is not None
        target_BT1 = logits_BT1V.argmax(-1)
        accepted_B = (uniforms_BT1[:, :-1] < self.alpha).long().cumprod(1).sum(1)
        return accepted_B, target_BT1.gather(1, accepted_B.unsqueeze(1)).squeeze(1)


def synthetic_sampler(rate: float, gamma: int, device: torch.device | str = "cpu", seed: int = 0) -> Sampler:
    """A sampler under which accepted ÷ proposed is `rate` at γ = `gamma`."""
    generator = torch.Generator(device).manual_seed(seed)
    return Sampler(Synthetic(alpha=solve_alpha(rate, gamma)), (generator,))


def solve_alpha(rate: float, gamma: int) -> float:
    """α with (α + α² + … + α^γ) ÷ γ = rate, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**i for i in range(1, gamma + 1)) / gamma < rate:
            low = middle
        else:
            high = middle
    return low
