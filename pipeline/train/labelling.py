"""What the target says of training texts, as stage teach stores it: labels, features, guides.

Shape legend: N sequences, B of them at a time, L tokens, P positions, V vocabulary, K listed tokens, R ranked
chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.train import Labels
from pipeline.decode.lean import side_by_side
from pipeline.decode.model import kept_inputs
from pipeline.errors import NotFinite
from pipeline.kv.view_cache import Ranker
from pipeline.train.features import half

POSITIONS = 1024  # positions whose logits are labelled at a time


def smallest_uint(num_tokens: int) -> type[np.unsignedinteger]:
    return np.uint16 if num_tokens <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class Ranking:
    """How the chunks of training prefixes are ranked: at these `places` of a sequence, the best `most` of
    `chunks`."""

    places: Sequence[int]
    most: int
    chunks: int

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
        ranked = [F.pad(guide, (0, self.most - guide.shape[1]), value=self.chunks) for guide in guides]
        return torch.stack(ranked, 1).cpu().numpy().astype(smallest_uint(self.chunks + 1))


@torch.inference_mode()
def label_sequences(
    target: PreTrainedModel,
    rows_NL: np.ndarray,
    labels: Labels,
    feature_layers: Sequence[int] = (),
    ranking: Ranking | None = None,
) -> dict[str, np.ndarray]:
    """The target's labels at every position of N sequences, features and guides; `argmax` is the last entry.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    num_tokens = int(target.num_tokens)
    kind = smallest_uint(num_tokens)
    batches: list[dict[str, np.ndarray]] = []
    for at in range(0, len(rows_NL), labels.batch_sequences):
        tokens_BL = torch.from_numpy(rows_NL[at : at + labels.batch_sequences].astype(np.int64))
        ranker = ranking.ranker(target, ranking.places) if ranking else None
        with kept_inputs(target, feature_layers) as kept:
            tokens_BL = tokens_BL.to(target.device)
            logits_BLV = target(input_ids=tokens_BL, use_cache=False, view_cache=ranker).logits
        # In slices, so that what is computed from the logits stays small beside them.
        pieces = [
            label_logits(target.name_or_path, logits_BPV, labels, kind)
            for logits_BPV in logits_BLV[..., :num_tokens].split(POSITIONS, dim=1)
        ]
        features = side_by_side(kept, feature_layers)
        given = {} if features is None else {"features": half(features)}
        if ranking and ranker:
            given["guide"] = ranking.stored(ranker)
        batches.append(
            given | {name: np.concatenate([p[name] for p in pieces], axis=1) for name in pieces[0]}
        )
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def label_logits(
    name: str, logits_BPV: Tensor, labels: Labels, kind: type[np.unsignedinteger]
) -> dict[str, np.ndarray]:
    """The labels that a target's logits give, by the names of their files; `argmax` is the last entry.

    Raises:
        NotFinite: if a logit is NaN or infinite.
    """
    if not torch.isfinite(logits_BPV).all():
        raise NotFinite(f"{name}: logits not finite while labelling")
    made: dict[str, np.ndarray] = {}
    if labels.top_k:
        top = logits_BPV.topk(min(labels.top_k, logits_BPV.shape[-1]), dim=-1)
        total_BP1 = (logits_BPV.float() / labels.temperature).logsumexp(-1, keepdim=True)
        log_probs_BPK = top.values.float() / labels.temperature - total_BP1
        made["ids"] = top.indices.cpu().numpy().astype(kind)
        made["log_probs"] = log_probs_BPK.cpu().numpy().astype(np.float16)
    return {**made, "argmax": logits_BPV.argmax(-1).cpu().numpy().astype(kind)}
