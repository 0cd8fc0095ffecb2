"""What a view keeps of one prefix, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels import dispatch
from pipeline.axes import Budget, Positions, View
from pipeline.kv.attention import Span
from pipeline.kv.guides import Guides
from pipeline.kv.policies import WINDOW, rank_chunks, select
from pipeline.kv.positions import moves, turn


def view_of(policy: str, budget: Budget, sinks: int = 0, positions: Positions = "true") -> View:
    """The view of a (policy, budget) pair, under the one name of its entries; `sinks` are a window's.

    Raises:
        ValueError: if a window is all sinks.
    """
    if policy == WINDOW and budget != "full" and 0 < budget <= sinks:
        raise ValueError(f"a window of {budget} with {sinks} sinks leaves no room for what comes last")
    return placed(View(policy, budget, sinks=sinks if policy == WINDOW else None), positions).kept


def placed(view: View, positions: Positions) -> View:
    """A view as a drafter of such `positions` has it: of some entries, where gaps between them may close.

    An offset of the sinks is for training alone.
    """
    gaps = view.budget not in ("full", 0) and view.policy != WINDOW
    return replace(view, positions=positions) if gaps and positions == "rebased" else view


def span_of(view: View) -> Span | None:
    """Of a view that rolls; None of one that only grows."""
    if view.policy != WINDOW or view.budget == "full":
        return None
    return Span(view.sinks or 0, view.budget - (view.sinks or 0))


def entries(views: Iterable[View], prefix: int) -> int:
    """Entries of a prefix of so many tokens that these views keep."""
    return sum(prefix if view.budget == "full" else min(view.budget, prefix) for view in views)


def readings(cuts: Sequence[tuple[int, View]]) -> dict[Span | None, list[int]]:
    """The numbers of the cuts that each reading of a prefix gives, by the window that it is read through.

    A model of several layers has other entries behind a window: what a token attends to changes what the next
    layer stores of it. So each window is a reading of its own; None reads all that comes before a token, as
    every other view has it, and a window that holds the whole prefix.
    """
    found: dict[Span | None, list[int]] = {}
    for number, (start, view) in enumerate(cuts):
        rolls = view.budget != "full" and view.budget < start
        found.setdefault(span_of(view) if rolls else None, []).append(number)
    return dict(sorted(found.items(), key=lambda item: item[0] is not None)) or {None: []}


@dataclass
class PrefixView:
    """The kept KV of one view of one prefix (or of B prefixes of equal length): per layer [B, H, N, D].

    Args:
        guide: what `target_guided` chooses by.
        last: of a head's prefix: the target's features [B, F] of its last token.
        asking: of a whole prefix, the queries [B, H, G, W, D] of the last layer at its last positions, and
            their scaling.
    """

    view: View
    prefix_tokens: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    guide: Tensor | None = None
    last: Tensor | None = None
    asking: tuple[Tensor, float] | None = None

    @property
    def kept(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def guiding(self) -> Guides:
        """The guide of this whole prefix, by the model that has read it."""
        assert self.asking is not None
        queries, scaling = self.asking
        return {self.prefix_tokens: rank_chunks(queries, self.layers[-1][0], scaling)}

    def cut(
        self,
        keys_BHSD: Tensor,
        values_BHSD: Tensor,
        observed: Tensor,
        frequencies: Tensor | None = None,
        offset: int = 0,
    ) -> None:
        """Add a layer: what the view keeps of the first `prefix_tokens` entries.

        Args:
            observed: queries [B, H, G, W, D] of the last positions of the prefix, which `snapkv` asks for.
            frequencies: as `positions.frequencies_of` gives them; for entries that are moved.
            offset: positions by which the sinks are moved back.

        Raises:
            ValueError: if entries are to be moved and there are no frequencies, or a guide is missing.
        """
        view, S = self.view, self.prefix_tokens
        keys, values = keys_BHSD[:, :, :S], values_BHSD[:, :, :S]
        kept_BHN = torch.arange(S, device=keys.device).expand(*keys.shape[:2], S)
        if view.budget != "full":
            kept_BHN = select(view.policy, keys, observed, view.budget, view.sinks or 0, self.guide)
            keys, values = dispatch.gather_kept(keys, values, kept_BHN)
        if (moves_BHN := moves(view, kept_BHN, S, offset)) is not None:
            keys = turn(keys, moves_BHN, frequencies)
        self.layers.append((keys, values))
