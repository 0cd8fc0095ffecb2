"""The target's readings for heads: features of prompts and of the texts behind them, shared by all heads.

Shape legend: B rows, S prompt length, Q tokens, F width of the features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.axes import FULL
from pipeline.decode.model import DecodeModel
from pipeline.decode.runner import Runner
from pipeline.errors import BadData
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.views import PrefixView

HELD_BYTES = 2**29  # of features, of prompts and of texts; what was read first is dropped first


class Reading(NamedTuple):
    """Of prompts that were read together: logits [B, V] behind them, and features [B, S, F] of them."""

    logits_BV: Tensor
    features_BSF: Tensor


class TargetReader:
    """A target that remembers what it read, for whichever heads ask: each prompt is read once as long as all
    of them fit into `HELD_BYTES`. The whole view of the last one is kept beside, for reading on behind it.
    """

    def __init__(self, target: DecodeModel) -> None:
        self.target = target
        self.held: dict[bytes, Reading] = {}
        self.texts: dict[tuple[bytes, tuple[int, ...]], Tensor] = {}
        self.last: tuple[bytes, PrefixView] | None = None

    def give(self, layers: Sequence[int], head: str) -> None:
        """Have the target hand out the inputs of these layers.

        Raises:
            BadData: if it hands out others already, to another head.
        """
        wanted, given = tuple(layers), self.target.feature_layers
        if given not in ((), wanted):
            raise BadData(
                f"the head {head!r} reads features of layers {list(wanted)}, and another of {list(given)}: "
                "heads that are evaluated together need the same"
            )
        self.target.feature_layers = wanted

    def read(self, tokens_BS: Tensor) -> Reading:
        key = key_of(tokens_BS)
        return self.held[key] if key in self.held else self.read_now(key, tokens_BS)[0]

    def read_now(self, key: bytes, tokens_BS: Tensor) -> tuple[Reading, PrefixView]:
        self.last = None  # one whole view at a time
        (view,), logits_BV, features_BSF = self.target.read(tokens_BS, [(tokens_BS.shape[1], FULL)])
        assert features_BSF is not None
        reading = Reading(logits_BV, features_BSF)
        self.last, self.held[key] = (key, view), reading
        self.make_room()
        return reading, view

    def make_room(self) -> None:
        """Drop the oldest prompts and their texts; the last prompt stays whatever its size."""
        while len(self.held) > 1 and self.num_bytes > HELD_BYTES:
            dropped = next(iter(self.held))
            del self.held[dropped]
            self.texts = {text: read for text, read in self.texts.items() if text[0] != dropped}

    @property
    def num_bytes(self) -> int:
        prompts = sum(reading.features_BSF.nbytes for reading in self.held.values())
        return prompts + sum(features.nbytes for features in self.texts.values())

    @torch.no_grad()
    def text_features(self, tokens_1S: Tensor, continuation: Sequence[int]) -> Tensor:
        """[Q, F] the features of the token before each of the first Q = M - 1 of a continuation of M."""
        key, count = key_of(tokens_1S), len(continuation) - 1
        text = key, tuple(continuation)
        if text not in self.texts:
            if self.last is not None and self.last[0] == key:
                reading, view = self.held[key], self.last[1]
            else:
                reading, view = self.read_now(key, tokens_1S)
            runner = Runner(self.target, 1, slots_for(tokens_1S.shape[1]), count, "none")
            runner.cache.load([view])
            tokens_1Q = torch.tensor([continuation[:-1]], device=tokens_1S.device)
            step_B = torch.zeros(1, dtype=torch.long, device=tokens_1S.device)
            _, read_1QF = self.target.hidden_and_features(tokens_1Q, step_B, runner.cache)
            assert read_1QF is not None
            features_QF = torch.cat([reading.features_BSF[0, -1:], read_1QF[0, :-1]])
            self.texts[text] = features_QF
            self.make_room()
            return features_QF
        return self.texts[text]

    def forget(self) -> None:
        """Free everything: what was read is for reading on, not for drafting."""
        self.last = None
        self.held.clear()
        self.texts.clear()


def key_of(tokens_BS: Tensor) -> bytes:
    """Prompts by their shape and tokens."""
    return repr(tuple(tokens_BS.shape)).encode() + tokens_BS.cpu().numpy().tobytes()
