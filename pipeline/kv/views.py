"""A view: what a drafter sees of one prefix."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels import dispatch
from pipeline.kv.policies import select


@dataclass(frozen=True)
class View:
    """What the drafter sees of a prefix: everything (budget None), or what a policy keeps within it."""

    policy: str
    budget: int | None

    @property
    def name(self) -> str:
        return self.policy if self.budget is None else f"{self.policy}/{self.budget}"


FULL = View("full", None)


def view_of(policy: str, budget: int | str) -> View:
    """The view of a sweep's (policy, budget) pair; budget "full" is the full view under every policy."""
    if budget == "full":
        return FULL
    return View("none" if budget == 0 else policy, int(budget))


@dataclass
class PrefixView:
    """The kept KV of one view of one prefix (or of B prefixes of equal length): per layer [B, H, N, D]."""

    view: View
    prefix_tokens: int
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.layers[0][0].shape[2]

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    def cut(self, keys_BHSD: Tensor, values_BHSD: Tensor, observed: Tensor) -> None:
        """Add a layer: what the view keeps of the first `prefix_tokens` entries.

        Args:
            observed: queries [B, H, G, W, D] of the last positions of the prefix, which `snapkv` asks for.
        """
        keys = keys_BHSD[:, :, : self.prefix_tokens]
        values = values_BHSD[:, :, : self.prefix_tokens]
        if self.view.budget is not None:
            kept_BHN = select(self.view.policy, keys, observed, self.view.budget)
            keys, values = dispatch.gather_kept(keys, values, kept_BHN)
        self.layers.append((keys, values))
