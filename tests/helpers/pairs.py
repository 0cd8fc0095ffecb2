"""A target and a drafter behind the same prompts, ready to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Compile, Runner
from pipeline.decode.sampling import GREEDY, Sampler
from pipeline.decode.sources import DraftSource, ModelDrafts
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.views import PrefixView
from pipeline.metrics import Round

NEVER: frozenset[int] = frozenset()


class Pair(NamedTuple):
    """Both sides, and the tokens that the target's prefill gives."""

    target: Runner
    drafter: Runner
    firsts: list[int]


def make_pair(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    view: View,
    room: int,
    compile: Compile = "none",
    read: Sequence[torch.Tensor] | None = None,
) -> Pair:
    """One row for each prompt [1, S]; the drafter reads `read` where it is given."""
    large, small = decode_model(target), decode_model(drafter)
    views: list[PrefixView] = []
    kept: list[PrefixView] = []
    firsts = []
    for prompt, other in zip(prompts, read or prompts, strict=True):
        (full,), logits = large.prefill(prompt, [(prompt.shape[1], FULL)])
        (sparse,), _ = small.prefill(other, [(other.shape[1], view)], full.guiding())
        views.append(full)
        kept.append(sparse)
        firsts.append(int(logits.argmax()))
    runners = [
        Runner(model, len(prompts), slots_for(max(v.kept for v in of)), room, compile)
        for model, of in ((large, views), (small, kept))
    ]
    runners[0].cache.load(views)
    runners[1].cache.load(kept)
    return Pair(*runners, firsts)


def plain_tokens(
    pair: Pair, limit: int, eos: frozenset[int] = NEVER, sampler: Sampler = GREEDY
) -> list[list[int]]:
    """Autoregressive continuations, one a row."""
    steps = list(autoregressive(pair.target, pair.firsts, limit, eos, sampler))
    return [
        [first, *(token for token in column if token is not None)]
        for first, *column in zip(pair.firsts, *steps, strict=True)
    ]


def rounds_of(
    pair: Pair,
    gamma: int,
    limit: int,
    eos: frozenset[int] = NEVER,
    sampler: Sampler = GREEDY,
    threshold: float = 0.0,
    source: DraftSource | None = None,
) -> list[list[Round]]:
    """The rounds of every row; proposals come from the pair's drafter unless there is another source."""
    source = source or ModelDrafts(pair.drafter, threshold)
    steps = list(speculate(pair.target, source, pair.firsts, gamma, limit, eos, sampler))
    rows = [[one for one in column if one is not None] for column in zip(*steps, strict=True)]
    return rows or [[] for _ in pair.firsts]


def tokens_of(pair: Pair, rounds: list[list[Round]]) -> list[list[int]]:
    return [
        [first, *(token for one in row for token in one.tokens)]
        for first, row in zip(pair.firsts, rounds, strict=True)
    ]
