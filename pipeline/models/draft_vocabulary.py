"""The draft vocabulary: the tokens that a drafter can propose, for which alone its head is multiplied.

A drafter with one keeps all rows of its head, so that its folder is a plain model; which of them are meant
lies beside its weights. Where its logits meet the target's they stand among those of all tokens; those
outside are so low that their probability is 0. So nothing else has to know: proposals, acceptance, rejection
sampling and replay are those of any drafter.

Shape legend: V tokens of the target, D tokens of the draft vocabulary, C hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import BadData

FILE = "draft_vocabulary.json"
FIELD = "train.draft_vocabulary"


class DraftHead(nn.Module):
    """A head [V, C] that is multiplied for some of its rows; its parameters are those of the whole one."""

    def __init__(self, whole: nn.Linear, tokens_D: Tensor) -> None:
        super().__init__()
        self.in_features = whole.in_features
        self.weight, self.bias = whole.weight, whole.bias
        self.register_buffer("tokens", tokens_D, persistent=False)
        self.tokens: Tensor

    @property
    def rows(self) -> Tensor:
        """[D, C], differentiable in the whole weight."""
        return self.weight[self.tokens]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.rows, None if self.bias is None else self.bias[self.tokens])


class DraftRows(nn.Linear):
    """A head that has the rows of its draft vocabulary alone; `tokens` are set when it is built or loaded."""

    tokens: Tensor

    def __init__(self, in_features: int, size: int) -> None:
        super().__init__(in_features, size, bias=False)
        self.register_buffer("tokens", torch.arange(size), persistent=False)

    @property
    def rows(self) -> Tensor:
        return self.weight


def restrict(model: PreTrainedModel, tokens_D: Tensor) -> PreTrainedModel:
    """Give a model a draft vocabulary: its logits are then those of these tokens, in their order.

    Args:
        tokens_D: ascending ids.

    Raises:
        BadData: if they are not ids of the model.
    """
    if int(tokens_D[-1]) >= model.num_tokens:
        raise BadData(
            f"the draft vocabulary of {model.name_or_path!r} names token {int(tokens_D[-1])}, and the model "
            f"has {model.num_tokens} tokens: it is of another model"
        )
    model.set_output_embeddings(DraftHead(model.get_output_embeddings(), tokens_D.to(model.device)))
    model.num_tokens = len(tokens_D)
    return model


def draft_tokens(model: PreTrainedModel) -> Tensor | None:
    """The draft vocabulary [D] of a model, where the model is; None without one."""
    head = model.get_output_embeddings()
    return head.tokens if isinstance(head, DraftHead | DraftRows) else None


def among_all(logits: Tensor, tokens_D: Tensor | None, num_tokens: int) -> Tensor:
    """Logits [..., D] as [..., V]; those without a draft vocabulary as they are."""
    if tokens_D is None:
        return logits
    lowest = torch.finfo(logits.dtype).min / 4  # finite: what is not is an error
    whole = logits.new_full((*logits.shape[:-1], num_tokens), lowest)
    return whole.index_copy(-1, tokens_D, logits)


def most_frequent(counts_V: np.ndarray, size: int, always: Collection[int]) -> Tensor:
    """The `size` tokens with the highest counts, ascending [D]; `always` among them; ties to the lower id.

    Raises:
        BadData: if there are not more tokens than that, or not so many as there are to be always.
    """
    if not len(always) <= size < len(counts_V):
        raise BadData(
            f"{FIELD}: {size} must be less than the {len(counts_V)} tokens of the vocabulary, and at least "
            f"{len(always)}, which end texts"
        )
    counts_V = counts_V.astype(np.int64)
    counts_V[list(always)] = np.iinfo(np.int64).max
    return torch.from_numpy(np.sort(np.argsort(-counts_V, kind="stable")[:size]))


def write_draft_tokens(model: PreTrainedModel, folder: Path) -> None:
    """Beside a model's weights, in a file that loaders of plain models pass over; nothing without one."""
    tokens_D = draft_tokens(model)
    if tokens_D is not None:
        stored = {"tokens": tokens_D.tolist(), "of": model.whole_tokens}
        (folder / FILE).write_text(json.dumps(stored) + "\n", encoding="utf-8")


def read_draft_tokens(folder: Path) -> Tensor | None:
    """The draft vocabulary [D] of a model's folder; None where it has none.

    Raises:
        BadData: if the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, RecursionError, LookupError, TypeError) as error:
        raise BadData(f"{file} holds no draft vocabulary ({error!r}): copy the folder again") from error
    whole = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
    if not whole or not tokens or tokens != sorted(set(tokens)):
        raise BadData(f"{file} holds no draft vocabulary (ascending ids): copy the folder again")
    return torch.tensor(tokens)
