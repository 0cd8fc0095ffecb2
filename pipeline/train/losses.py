"""The two branches of the training loss: L = w·L_A + λ·L_C (paper section 3).

L_A compares the drafter behind its full view with the target, L_C behind sparse views; the target's labels
are the same for every view. A new loss is a function, a line of LOSSES, and its name
in `LossKind` of config/train.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels import dispatch, distill_loss, reference


@dataclass(frozen=True)
class TargetLabels:
    """What the target said at T positions: its arg-max [T], and optionally its top K log-probabilities.

    `ids` and `log_probs` are [T, K], normalised over the whole vocabulary at `temperature`.
    """

    argmax: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    temperature: float = 1.0


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

    Args:
        scores: logits [T, V], or the states that they would be made of; so for all losses.

    Returns:
        One value a position, [T].
    """
    if isinstance(scores, States):
        return distill_loss.cross_entropy(scores.hidden, scores.head, labels.argmax, backend=scores.backend)
    return reference.cross_entropy(scores, labels.argmax)


def kl(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """Forward KL over the stored entries and one bucket for the rest: a lower bound of the true one."""
    listed = (*stored(labels), labels.temperature)
    if isinstance(scores, States):
        return distill_loss.kl(scores.hidden, scores.head, *listed, backend=scores.backend)
    return reference.kl(scores, *listed)


def total_variation(scores: Tensor | States, labels: TargetLabels) -> Tensor:
    """One minus the expected acceptance when sampling, over the same buckets: a lower bound."""
    listed = (*stored(labels), labels.temperature)
    if isinstance(scores, States):
        return distill_loss.total_variation(scores.hidden, scores.head, *listed, backend=scores.backend)
    return reference.total_variation(scores, *listed)


def stored(labels: TargetLabels) -> tuple[Tensor, Tensor]:
    if labels.ids is None or labels.log_probs is None:
        raise ValueError("kl and total_variation need stored log-probabilities: set labels.top_k > 0")
    return labels.ids, labels.log_probs


LOSSES: dict[str, Callable[[Tensor | States, TargetLabels], Tensor]] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "total_variation": total_variation,
}
