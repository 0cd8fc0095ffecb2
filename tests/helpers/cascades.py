"""A cascade behind the same prompts as a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from pipeline.axes import View
from pipeline.decode.cascade import CascadeDrafts
from pipeline.decode.runner import Compile
from tests.helpers.pairs import Pair, make_pair


class Cascade(NamedTuple):
    """The pair of self-speculation: the target, and the target behind `middle`; and the source of a cascade
    whose middle is that."""

    pair: Pair
    source: CascadeDrafts


def make_cascade(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    middle: View,
    inner: View,
    inner_gamma: int,
    room: int,
    compile: Compile = "none",
) -> Cascade:
    """One row for each prompt [1, S]; `inner` is the drafter's view."""
    pair = make_pair(target, target, prompts, middle, room + inner_gamma, compile)
    small = make_pair(target, drafter, prompts, inner, room + inner_gamma, compile).drafter
    return Cascade(pair, CascadeDrafts(small, pair.drafter, inner_gamma))
