"""The two branches of the training loss: L = w·L_A + λ·L_C (paper section 3).

L_A compares the drafter behind its full view with the target, L_C behind sparse views; the target's labels
are the same for every view. A new loss is one function and one line of LOSSES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class TargetLabels:
    """What the target said at T positions: its arg-max [T], and optionally its top K log-probabilities.

    `ids` and `log_probs` are [T, K], normalised over the whole vocabulary at `temperature`.
    """

    argmax: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    temperature: float = 1.0


def cross_entropy(logits_TV: Tensor, labels: TargetLabels) -> Tensor:
    """Against the arg-max: a greedy proposal is accepted exactly when the drafter's arg-max equals it."""
    return reference.cross_entropy(logits_TV, labels.argmax)


def kl(logits_TV: Tensor, labels: TargetLabels) -> Tensor:
    """Forward KL over the stored entries and one bucket for the rest: a lower bound of the true one."""
    ids, log_probs = stored(labels)
    return reference.kl(logits_TV, ids, log_probs, labels.temperature)


def total_variation(logits_TV: Tensor, labels: TargetLabels) -> Tensor:
    """One minus the expected acceptance when sampling, over the same buckets: a lower bound."""
    ids, log_probs = stored(labels)
    return reference.total_variation(logits_TV, ids, log_probs, labels.temperature)


def stored(labels: TargetLabels) -> tuple[Tensor, Tensor]:
    if labels.ids is None or labels.log_probs is None:
        raise ValueError("kl and total_variation need stored log-probabilities: set labels.top_k > 0")
    return labels.ids, labels.log_probs


LOSSES: dict[str, Callable[[Tensor, TargetLabels], Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "total_variation": total_variation,
}
