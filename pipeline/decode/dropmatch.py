"""DropMatch, an acceptance rule that is lossy: what it emits is not the target's own text (arXiv 2603.03333).

The target's last hidden state is read through its head K times more, each time behind another dropout mask.
A proposal stands if one of these arg-maxes gives it, or the target's own arg-max does, which would be emitted
anyhow. Behind the last proposal that stands comes the target's own arg-max, without dropout. The paper's
second test, by Jensen-Shannon divergence, is not here. Greedy decoding only.

A mask depends on a seed, its number, and the absolute position of the token that is judged, so that a text
can be decoded again. There is no replay: the text depends on the proposals, and is not the target's.

Shape legend: B rows, T proposals of a round, T1 is T + 1, C hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import Backend

Bits = TypeVar("Bits", int, Tensor)
LOW = 2**32 - 1  # the 32 low bits


@dataclass(frozen=True)
class DropMatch:
    """K `masks`, each of which drops a share `dropout` of the hidden state's channels, drawn by `seed`."""

    masks: int
    dropout: float
    seed: int

    def kept(self, number: int, positions_BT: Tensor, width: int) -> Tensor:
        """The mask of this number at each position: [B, T, C], True where a channel is kept."""
        place_BT1 = mix(positions_BT ^ mix(mix(self.seed & LOW) ^ number)).unsqueeze(-1)
        channels_C = torch.arange(width, device=positions_BT.device)
        return mix(place_BT1 ^ channels_C) >= round(self.dropout * 2**32)

    def accept(
        self,
        head: Callable[[Tensor], Tensor],
        hidden_BTC: Tensor,
        draft_BT: Tensor,
        best_BT1: Tensor,
        positions_BT: Tensor,
        lengths_B: Tensor,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        """Accepted proposals [B] of each round, and the target's own token after them [B].

        Args:
            head: […, C] → […, V], the target's.
            hidden_BTC: the target's last hidden states, those that it predicts each proposal from.
            best_BT1: the target's arg-max without dropout, before each proposal and after the last.
            positions_BT: of the proposals.
            lengths_B: proposals of each round.
        """
        stands_BT = draft_BT == best_BT1[:, :-1]
        for number in range(self.masks):  # one at a time: only one mask's logits are in memory
            kept_BTC = self.kept(number, positions_BT, hidden_BTC.shape[-1])
            masked_BTC = hidden_BTC * kept_BTC / (1 - self.dropout)
            stands_BT = stands_BT | (head(masked_BTC).argmax(-1) == draft_BT)
        # What stands is taken for the target's choice; what does not stand differs from the target's own.
        taken_BT = torch.where(stands_BT, draft_BT, best_BT1[:, :-1])
        taken_BT1 = torch.cat([taken_BT, best_BT1[:, -1:]], 1)
        accepted_B, _ = dispatch.greedy_accept(draft_BT, taken_BT1, lengths_B, backend)
        return accepted_B, best_BT1.gather(1, accepted_B.unsqueeze(1)).squeeze(1)


def mix(bits: Bits) -> Bits:
    """32 bits spread over all 32 of the result, one to one: multiplications and shifts."""
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B & LOW
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B & LOW
    return bits ^ (bits >> 16)
