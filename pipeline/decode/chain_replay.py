"""Exact replay of a head: the chains from all tokens of a continuation at once.

A round's chain builds on emitted tokens and on true features alone, and what it proposes at a depth counts
only if all before it was right. So the chain from token t can be fed the tokens of the text: at depth s it
says whether the proposal for token t + s + 1 would have been that token. From these, [token, depth], the
rounds of every γ follow by counting, as for other drafters.

Shape legend: R views, Q = M - 1 tokens after the first of a continuation of M, H width, F width of the
features, T depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.decode.replay import Told, chances, confidences, finite_views
from pipeline.kv.views import PrefixView
from pipeline.models.draft_vocabulary import among_all
from pipeline.models.heads.eagle import FeatureHead


@torch.no_grad()
def tell_chains(
    head: FeatureHead,
    kept: Sequence[PrefixView],
    continuation: Sequence[int],
    features_QF: Tensor,
    depth: int,
    temperature: float = 0.0,
    log_probs: Sequence[float] = (),
    surely: bool = False,
) -> Told:
    """As `replay.tell`, for chains of `depth` from every token.

    Args:
        kept: R views with one row each, as `FeatureHead.prefix` gives them.
        features_QF: the target's, of the token before each of the first Q.
    """
    device, count, rows = head.device, len(continuation) - 1, len(kept)
    tokens_1Q = torch.tensor([continuation[:-1]], device=device)
    slots_1Q = kept[0].prefix_tokens + torch.arange(count, device=device).unsqueeze(0)
    parts = head.project(tokens_1Q, head.fuse(features_QF.to(head.dtype).unsqueeze(0)), slots_1Q)
    query, key, value, residual = (part.expand(rows, *part.shape[1:]) for part in parts)
    outputs = head.chains(kept, tokens_1Q.expand(rows, -1), query, key, value, residual, depth)
    told = [
        tell_depth(head, out, at, continuation, temperature, log_probs, surely)
        for at, out in enumerate(outputs)
    ]
    finite = [all(views) for views in zip(*(one.finite for one in told), strict=True)]
    if temperature > 0:
        return Told(finite, chances=np.stack([np.asarray(one.chances) for one in told], -1))
    sure = np.stack([one.sure for one in told], -1).tolist() if surely else ()
    return Told(finite, np.stack([one.match for one in told], -1).tolist(), sure)


def tell_depth(
    head: FeatureHead,
    out_RQH: Tensor,
    at: int,
    continuation: Sequence[int],
    temperature: float,
    log_probs: Sequence[float],
    surely: bool,
) -> Told:
    """What the chains say at one depth, [R, Q]; where the text has ended they say no."""
    count = len(continuation) - 1 - at  # chains whose token at this depth is in the text
    if count < 1:
        nothing = np.zeros(out_RQH.shape[:2])
        return Told([True] * len(out_RQH), nothing > 0, nothing, nothing)
    logits_RQV = among_all(head.lm_head(out_RQH[:, :count]), head.lm_head.tokens, head.whole_tokens)
    text = continuation[at:]

    def padded(values: object) -> np.ndarray:
        return np.pad(np.asarray(values), ((0, 0), (0, at)))

    finite = finite_views(logits_RQV)
    if temperature > 0:
        given = log_probs[at:]
        return Told(finite, chances=padded(chances(logits_RQV, text, given, temperature)))
    following_Q = torch.tensor(text[1:], device=logits_RQV.device)
    match = padded((logits_RQV.argmax(-1) == following_Q).cpu().numpy())
    return Told(finite, match, padded(confidences(logits_RQV)) if surely else ())


class ChainMatch:
    """Of a head: its slots depend on no attention, and its chains begin anew in every round.

    Args:
        features_QF: the target's, of the token before each of the first Q.
    """

    def __init__(
        self, head: FeatureHead, continuation: Sequence[int], features_QF: Tensor, depth: int
    ) -> None:
        self.head, self.text, self.features_QF, self.depth = head, continuation, features_QF, depth

    def __call__(self, kept: PrefixView, start: int, end: int) -> Sequence[Sequence[bool]]:
        told = tell_chains(self.head, [kept], self.text, self.features_QF, self.depth)
        found: Sequence[Sequence[bool]] = told.match[0][start:end]
        return found
