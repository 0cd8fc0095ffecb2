"""Guides: a prefix's chunks as the target ranks them, by which the policy `target_guided` chooses.

A prompt's guide comes with its prefill (`PrefixView.guiding`). Of training texts a `Ranker` gives those of
many prefixes while the target reads them once.

Shape legend: B texts of L tokens, P prefixes of each, C chunks of a prefix, R ranked chunks, H key/value
heads, G query heads per key/value head, S stored tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from kernels.reference import CHUNK
from pipeline.axes import View
from pipeline.kv.attention import causal_attention
from pipeline.kv.policies import GUIDED, SNAP_WINDOW, rank_chunks

Guides = Mapping[int, Tensor]  # ranked chunks [B, R] of prefixes, by their length in tokens
UNGUIDED: Guides = {}


def stored_guide(prefix_tokens: int, chunks: Sequence[int], device: torch.device) -> Guides:
    """The guide of one prefix as rows have it; none where they are empty."""
    return {prefix_tokens: torch.tensor([chunks], device=device)} if chunks else UNGUIDED


def are_guided(views: Iterable[View]) -> bool:
    """Whether some of these views are chosen by a guide."""
    return any(view.policy == GUIDED and view.budget not in ("full", 0) for view in views)


class Ranker:
    """Has a model that reads texts rank the chunks of some of their prefixes; what `attend` is handed as
    `view_cache`.

    Args:
        layer: the model's last.
        lengths: of the prefixes, in tokens.
        most: chunks that are kept of each ranking.
    """

    def __init__(self, layer: int, lengths: Sequence[int], most: int) -> None:
        self.layer, self.lengths, self.most = layer, lengths, most
        self.guides: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if layer == self.layer:
            queries_BHGSD = query.unflatten(1, (key.shape[1], -1))
            for length in self.lengths:
                observed = queries_BHGSD[:, :, :, max(0, length - SNAP_WINDOW) : length]
                ranked_BC = rank_chunks(observed, key[:, :, :length], scaling)
                self.guides[length] = ranked_BC[:, : self.most]
        return causal_attention(query, key, value, scaling)


def chunk_kind(sequence_tokens: int) -> type[np.unsignedinteger]:
    """What the numbers of a sequence's chunks are stored as, and one more for a chunk that there is not."""
    return np.uint16 if sequence_tokens // CHUNK < 1 << 16 else np.uint32


@dataclass(frozen=True)
class Ranking:
    """How the chunks of training prefixes are ranked: at these `places` of sequences of so many tokens, the
    best `most` of them."""

    places: Sequence[int]
    most: int
    sequence_tokens: int

    def ranker(self, target: PreTrainedModel, lengths: Sequence[int]) -> Ranker:
        last = target.config.get_text_config(decoder=True).num_hidden_layers - 1
        return Ranker(last, lengths, self.most)

    @torch.no_grad()
    def of_texts(self, target: PreTrainedModel, tokens_BL: Tensor, lengths: Sequence[int]) -> np.ndarray:
        """[B, P, R], of these prefixes of texts that are read for nothing else."""
        ranker = self.ranker(target, lengths)
        target.base_model(input_ids=tokens_BL[:, : max(lengths)], use_cache=False, view_cache=ranker)
        return self.stored(ranker)

    def stored(self, ranker: Ranker) -> np.ndarray:
        """[B, P, R], of the P prefixes that a ranker has seen."""
        guides = [ranker.guides[length] for length in ranker.lengths]
        no_chunk = self.sequence_tokens // CHUNK
        ranked = [F.pad(guide, (0, self.most - guide.shape[1]), value=no_chunk) for guide in guides]
        return torch.stack(ranked, 1).cpu().numpy().astype(chunk_kind(self.sequence_tokens))
