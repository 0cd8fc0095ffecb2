"""What a head reads beside its tokens: hidden states of the target, stored by stage teach or given anew.

Shape legend: B rows, L tokens of a sequence, S tokens of a text, F width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.models import Head
from pipeline.decode.model import DecodeModel
from pipeline.errors import NotFinite
from pipeline.models.heads.begin import default_layers
from pipeline.store.rows import Prompt
from pipeline.train.batches import Shards

VALIDATION = "features"  # folder beside the labels, with a file for each validation prompt


class Features(Protocol):
    def of_rows(self, rows: Sequence[int], tokens_BL: Tensor) -> Tensor:
        """[B, L, F] of labelled rows, on their tokens' device."""
        ...

    def of_text(self, number: int, tokens_1S: Tensor) -> Tensor:
        """[1, S, F] of a validation prompt with its continuation."""
        ...


class StoredFeatures:
    """Of a labels folder, in half precision; `texts` are the files of validation prompts, in their order."""

    def __init__(self, folder: Path, texts: Sequence[Path]) -> None:
        self.rows, self.texts = Shards(sorted(folder.glob("*.features.npy"))), texts

    def of_rows(self, rows: Sequence[int], tokens_BL: Tensor) -> Tensor:
        return self.rows.rows(rows).to(tokens_BL.device)

    def of_text(self, number: int, tokens_1S: Tensor) -> Tensor:
        found = np.load(self.texts[number]).astype(np.float32)
        return torch.from_numpy(found).unsqueeze(0).to(tokens_1S.device)


class GivenFeatures:
    """The target reads the tokens each time."""

    def __init__(self, target: DecodeModel, layers: Sequence[int]) -> None:
        self.target = target
        target.feature_layers = tuple(layers)

    def of_rows(self, rows: Sequence[int], tokens_BL: Tensor) -> Tensor:
        return self.read(tokens_BL)

    def of_text(self, number: int, tokens_1S: Tensor) -> Tensor:
        return self.read(tokens_1S)

    def read(self, tokens_BS: Tensor) -> Tensor:
        # In the target's own precision, as evaluation has it, whatever training computes in.
        with torch.autocast(tokens_BS.device.type, enabled=False):
            _, _, features_BSF = self.target.read(tokens_BS, [])
        assert features_BSF is not None
        return features_BSF.float()


def half(features: Tensor) -> np.ndarray:
    """Features as they are stored.

    Raises:
        NotFinite: if one is beyond half precision.
    """
    stored = features.to(torch.float16)
    if not torch.isfinite(stored).all():
        raise NotFinite(
            "hidden states of the target are beyond half precision, in which they are stored: set "
            "labels.features: recomputed"
        )
    return stored.cpu().numpy()


def features_of(spec: Head, target: PreTrainedModel) -> tuple[int, ...]:
    """The layers whose inputs a head of this config reads."""
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    return tuple(spec.feature_layers or default_layers(layers))


def features_file(output: Path, prompt: Prompt) -> Path:
    """Of a validation prompt with its continuation."""
    return output / VALIDATION / f"{prompt.prompt_id.replace('/', '-')}.npy"
