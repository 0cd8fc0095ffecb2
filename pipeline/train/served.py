"""Learning from served rounds: KL to the target first, then reward-masked cross entropy.

A served text is an answer with the target's labels, so views, windows and resuming are those of all training.
What the rounds add is which labels were decided by a proposal. In a round that begins at token t of a text
with γ proposals of which n are accepted, proposals t .. t+n are decided: n are accepted, the next is the
first to be rejected. Those behind it continue a text that the target does not write, and count for nothing;
of a round that accepts everything, the target's own token at its end was never proposed, and does not count
either. Draft, verify, improve (arXiv 2510.05421) adds a policy gradient. It is left out: greedy proposals are
not drawn from q, so that −reward · log q would be the gradient of no expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.store.files import read_rows
from pipeline.store.layout import SERVED_ROUNDS
from pipeline.store.rows import Continuation, Prompt, ServedText
from pipeline.train.batches import LabelledSequences
from pipeline.train.objectives import MultiView


class ServedViews:
    """L = w·L_A + λ·L_C over served texts, by one loss up to a step, and by another from there on.

    Args:
        served: folder of the shards, as `data` was read from.
        kl_steps: optimizer steps by KL on every label; the others are by cross entropy on decided ones.
    """

    def __init__(
        self,
        config: Config,
        variant: Variant,
        data: LabelledSequences,
        validation: Sequence[tuple[Prompt, Continuation]],
        device: torch.device,
        served: Path,
        kl_steps: int,
    ) -> None:
        def by(loss: str, texts: LabelledSequences) -> MultiView:
            behind = variant.model_copy(update={"full_loss": loss, "sparse_loss": loss})
            return MultiView(config, behind, texts, validation, device)

        rows = [row for file in served_files(served) for row in read_rows(file, ServedText)]
        self.kl_steps = kl_steps
        self.everywhere = by("kl", data)
        self.decided = by("cross_entropy", data.among(decided(rows, config.train.learned_tokens)))
        self.tokens_per_micro = self.everywhere.tokens_per_micro

    def at(self, step: int) -> MultiView:
        return self.everywhere if step < self.kl_steps else self.decided

    def loss(self, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.at(step).loss(model, step, micro)

    def name_batch(self, step: int, micro: int) -> str:
        return self.at(step).name_batch(step, micro)

    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        return self.everywhere.validate(model)


def served_files(folder: Path) -> list[Path]:
    """The rounds of each shard, in the order in which `LabelledSequences` has their rows."""
    return sorted(folder.glob(f"*.{SERVED_ROUNDS}"))


def decided(rows: Sequence[ServedText], labels: int) -> np.ndarray:
    """[N, A] whether the label was decided by a proposal: accepted, or the first to be rejected.

    Label a of a text is about its token a + 1.
    """
    chosen_NA = np.zeros((len(rows), labels), dtype=bool)
    for chosen_A, text in zip(chosen_NA, rows, strict=True):
        for one in text.rounds:
            count = min(one.accepted + 1, len(one.proposals))
            chosen_A[one.begins_at - 1 : one.begins_at - 1 + count] = True
    return chosen_NA
