"""Small random models, their tokenizer and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

VOCABULARY = 97


@dataclass
class FakeTokenizer:
    """As much of a tokenizer as building a model needs."""

    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0

    def __len__(self) -> int:
        return VOCABULARY


def sharpen(model: PreTrainedModel, factor: float = 8.0) -> PreTrainedModel:
    """Scale the weights of a random model, so that its arg-max depends on what it reads."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
