"""Where kept entries stand: at their own positions, or moved.

A rotated query and key (RoPE) meet by their distance alone, so that moving entries is turning their keys once
more; what follows them stays where it is.

- rebased: entries are moved up to what follows them, with no gaps between, as if positions began at 0 with
  the first of them. No distance is then longer than what is kept and the continuation.
- an offset: the sinks are moved back. So a drafter that is trained on short texts meets the distance between
  sinks and recent entries that longer ones have.

Shape legend: B rows, H key/value heads, N kept entries, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.axes import View
from pipeline.kv.policies import SINKS, WINDOW


def frequencies_of(model: nn.Module) -> Tensor | None:
    """[D/2] radians a position by which a model turns its keys; None where it has no one way to."""
    rotary = getattr(getattr(model, "base_model", model), "rotary_emb", None)
    found: Tensor | None = getattr(rotary, "inv_freq", None)
    return found


def moves(view: View, kept_BHN: Tensor, prefix_tokens: int, offset: int) -> Tensor | None:
    """By how many positions each kept entry is moved, as `kept_BHN`; None where all stay.

    Args:
        kept_BHN: ascending indices of the kept entries, of `prefix_tokens`.
        offset: by which the sinks are moved back.
    """
    if view.positions == "rebased":
        N = kept_BHN.shape[-1]
        return torch.arange(prefix_tokens - N, prefix_tokens, device=kept_BHN.device) - kept_BHN
    if offset:
        sinks = (view.sinks or 0) if view.policy == WINDOW else SINKS
        return torch.where(kept_BHN < sinks, -offset, 0)
    return None


def turn(keys_BHND: Tensor, moves_BHN: Tensor, frequencies: Tensor | None) -> Tensor:
    """Keys of entries that are moved by so many positions.

    Raises:
        ValueError: without frequencies.
    """
    if frequencies is None:
        raise ValueError("positions of kept entries can be moved in models that rotate all of a key one way")
    angles = torch.cat([moves_BHN.unsqueeze(-1).float() * frequencies] * 2, -1)
    left, right = keys_BHND.chunk(2, -1)
    turned = keys_BHND * angles.cos() + torch.cat([-right, left], -1) * angles.sin()
    return turned.to(keys_BHND.dtype)
