"""The losses ℓ between drafter and target, position by position; `objectives.py` adds them up over the two
branches, L = w·L_A + λ·L_C (paper section 3).

L_A compares the drafter behind its full view with the target, L_C behind sparse views; the target's labels
are the same for every view. A new loss is a function, a line of LOSSES, and its name
in `LossKind` of config/train.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import dispatch, distill_loss, reference

LEAST_ACCEPTANCE = 1e-6  # below, its logarithm is cut off


@dataclass(frozen=True)
class TargetLabels:
    """What the target said at T positions: its arg-max [T], and optionally its top K log-probabilities.

    `ids` and `log_probs` are [T, K], normalised over the whole vocabulary at `temperature`.
    """

    argmax: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    temperature: float = 1.0
    proposable: Tensor | None = None
    inside: Tensor | None = None

    def take(self, places: Tensor) -> TargetLabels:
        """Those of some positions."""

        def taken(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[places]

        return replace(
            self,
            argmax=self.argmax[places],
            ids=taken(self.ids),
            log_probs=taken(self.log_probs),
            proposable=taken(self.proposable),
            inside=taken(self.inside),
        )

    def within(self, tokens_D: Tensor, num_tokens: int) -> TargetLabels:
        """The same for a drafter that can propose these tokens alone: ids are then their numbers among them.

        `proposable` [T] says whether the arg-max is one of them, `inside` [T, K] which of the ids are. The
        others get ids that are unused in their row, as placeholders.
        """
        place_V = torch.full((num_tokens,), -1, device=tokens_D.device)
        place_V[tokens_D] = torch.arange(len(tokens_D), device=tokens_D.device)
        argmax_T = place_V[self.argmax]
        labels = replace(self, argmax=argmax_T.clamp_min(0), proposable=argmax_T >= 0)
        if self.ids is None:
            return labels
        placed_TK = place_V[self.ids]
        return replace(labels, ids=distinct(placed_TK), inside=placed_TK >= 0)


def distinct(placed_TK: Tensor) -> Tensor:
    """Numbers of which none is twice in a row: those below 0 give way to the lowest that are free there."""
    T, K = placed_TK.shape
    taken_TN = torch.zeros(T, 2 * K, dtype=torch.bool, device=placed_TK.device)
    low_TK = (placed_TK >= 0) & (placed_TK < 2 * K)
    rows_T1 = torch.arange(T, device=placed_TK.device).unsqueeze(1)
    taken_TN[rows_T1.expand(-1, K)[low_TK], placed_TK[low_TK]] = True
    free_TK = taken_TN.int().argsort(dim=1, stable=True)[:, :K]  # there are K and more
    nth_TK = (placed_TK < 0).long().cumsum(1) - 1
    return torch.where(placed_TK < 0, free_TK.gather(1, nth_TK.clamp_min(0)), placed_TK)


@dataclass(frozen=True)
class States:
    """Final hidden states [T, H] and the head [V, H], where logits [T, V] would be too large to make."""

    hidden: Tensor
    head: Tensor

    @property
    def backend(self) -> dispatch.Backend:
        return dispatch.backend(self.hidden.device)


def cross_entropy(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """Against the arg-max: a greedy proposal is accepted exactly when the drafter's arg-max equals it.

    Where it is outside a draft vocabulary no proposal could be right, and the loss is 0.

    Args:
        scores: logits [T, V], or the states that they would be made of; so for all losses.

    Returns:
        One value a position, [T].
    """
    if isinstance(scores, States):
        hidden, head = scores.hidden, scores.head
        loss_T = distill_loss.cross_entropy(hidden, head, labels.argmax, backend=scores.backend)
    else:
        loss_T = reference.cross_entropy(scores, labels.argmax)
    return loss_T if labels.proposable is None else loss_T * labels.proposable


def kl(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """Forward KL over the stored entries and one bucket for the rest: a lower bound of the true one.

    With a draft vocabulary it is an estimate, as what was not stored is taken to lie inside.
    """
    listed = (*stored(labels), labels.temperature, labels.inside)
    if isinstance(scores, States):
        return distill_loss.kl(scores.hidden, scores.head, *listed, backend=scores.backend)
    return reference.kl(scores, *listed)


def total_variation(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """One minus the expected acceptance when sampling, over the same buckets: a lower bound."""
    listed = (*stored(labels), labels.temperature, labels.inside)
    if isinstance(scores, States):
        return distill_loss.total_variation(scores.hidden, scores.head, *listed, backend=scores.backend)
    return reference.total_variation(scores, *listed)


def nla(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """Minus the logarithm of the expected acceptance when sampling, over the same buckets: a lower bound."""
    return -(1 - total_variation(scores, labels)).clamp_min(LEAST_ACCEPTANCE).log()


def lk_hybrid(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """KL where little is accepted, total variation where much is: μ·KL + (1 − μ)·TV.

    μ = e^(−3·acceptance), position by position, and no gradient goes through it.
    """
    distance = total_variation(scores, labels)
    share = (-3 * (1 - distance.detach())).exp()
    return share * kl(scores, labels) + (1 - share) * distance


def stored(labels: TargetLabels) -> tuple[Tensor, Tensor]:
    if labels.ids is None or labels.log_probs is None:
        raise ValueError("losses of distributions need stored log-probabilities: set labels.top_k > 0")
    return labels.ids, labels.log_probs


LOSSES: dict[str, Callable[[Tensor | States, TargetLabels], Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "total_variation": total_variation,
    "nla": nla,
    "lk_hybrid": lk_hybrid,
}
