"""The static cache of decoding: per layer one buffer with slots for the kept prefix and for the continuation.

Nothing in it grows or moves: continuation token t of row b sits in slot `kept_B[b] + t` and at position
`prefix_B[b] + t`. A forward pass is told where its tokens begin, writes their KV there and sees the slots up
to its own. To roll back, the next pass begins earlier. Rows may hold prefixes of different lengths and be at
different places, and every shape is known before the first token: steps can be compiled and captured once.

Shape legend: B rows, H key/value heads, G query heads per key/value head, S slots, Q new tokens, D head
width, R room for the continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from pipeline.axes import View
from pipeline.kv.attention import Span
from pipeline.kv.views import PrefixView, span_of

ROUND_SLOTS = 64  # prefixes of nearly equal length share their shapes, and with them compiled steps


class Geometry(NamedTuple):
    """What a model's KV look like."""

    layers: int
    kv_heads: int
    groups: int
    width: int
    dtype: torch.dtype
    device: torch.device

    def num_bytes(self, rows: int, slots: int) -> int:
        """Keys and values of so many rows and slots, all layers."""
        return 2 * self.layers * rows * self.kv_heads * slots * self.width * self.dtype.itemsize


class SlotIndex(NamedTuple):
    """Where Q new tokens of each row go, and what they see.

    Torch's attention takes the mask, the Triton kernel the number of tokens stored with the new ones, and the
    window.
    """

    rows_B1: Tensor
    steps_BQ: Tensor
    slots_BQ: Tensor
    mask_B1MS: Tensor | None
    stored_B: Tensor | None
    span: Span | None = None


Rotation = Callable[[Tensor], tuple[Tensor, Tensor]]


class SlotCache:
    """Buffers of B rows for prefixes of up to `capacity` kept entries and `room` continuation tokens.

    With a model's `rotation` it also holds the cosines and sines [B, R, …] of the continuation's positions.
    """

    def __init__(
        self, geometry: Geometry, rows: int, capacity: int, room: int, rotation: Rotation | None = None
    ) -> None:
        self.geometry, self.rows, self.capacity, self.room = geometry, rows, capacity, room
        self.backend = dispatch.backend(geometry.device)
        shape = (rows, geometry.kv_heads, self.capacity + room, geometry.width)
        device = geometry.device
        # Zeros, as hidden slots are still multiplied by a weight of 0, and 0 · NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=geometry.dtype, device=device) for _ in range(geometry.layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.kept_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.prefix_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.rows_B1 = torch.arange(rows, device=device).unsqueeze(1)
        self.step_R = torch.arange(room, device=device)
        self.slot_S = torch.arange(shape[2], device=device)
        self.seen, self.hidden = torch.tensor([0.0, -torch.inf], dtype=geometry.dtype, device=device)
        self.span: Span | None = None  # of the views that are loaded, where they roll
        self.asked: Tensor | None = None  # [B, R, H·G, D], where `note_queries` was called
        self.rotation, self.turns = rotation, None
        if rotation is not None:
            self.turns = rotation(self.step_R.repeat(rows, 1))

    def load(self, views: Sequence[PrefixView]) -> None:
        """Restart behind these views, one for each row."""
        assert len(views) == self.rows
        for row, view in enumerate(views):
            self.load_row(row, view)

    def load_row(self, row: int, view: PrefixView, number: int = 0) -> None:
        """Restart a row behind a view; where the view is of several prefixes, behind the one of this number.

        Raises:
            ValueError: if the view keeps more than the buffers hold.
        """
        if view.kept > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} prefix entries, the view has {view.kept}")
        for buffers, part in ((self.keys, 0), (self.values, 1)):
            for buffer, layer in zip(buffers, view.layers, strict=True):
                buffer[row, :, : view.kept] = layer[part][number]
                buffer[row, :, view.kept :] = 0
        self.span = span_of(view.view)
        self.kept_B[row], self.prefix_B[row] = view.kept, view.prefix_tokens
        if self.rotation is not None and self.turns is not None:
            positions_1R = (view.prefix_tokens + self.step_R).unsqueeze(0)
            for turns, table in zip(self.turns, self.rotation(positions_1R), strict=True):
                turns[row] = table[0]

    def note_queries(self) -> None:
        """From now on keep the last layer's queries, scaled, of tokens that are read together."""
        if self.asked is None:
            heads = self.geometry.kv_heads * self.geometry.groups
            self.asked = self.keys[0].new_zeros(self.rows, self.room, heads, self.geometry.width)

    def ask(self, layer: int, query_BQhD: Tensor, scaling: float, place: SlotIndex) -> None:
        """Keep queries of a layer, if it is the last and they are asked for."""
        last = layer == self.geometry.layers - 1
        if last and self.asked is not None and query_BQhD.shape[1] > 1:
            self.asked[place.rows_B1, place.steps_BQ] = query_BQhD * scaling

    def exchange(self, row: int, view: PrefixView) -> None:
        """Put other entries of a row's prefix, as many, in place of those that are kept."""
        assert view.kept == self.kept_B[row]
        for buffers, part in ((self.keys, 0), (self.values, 1)):
            for buffer, layer in zip(buffers, view.layers, strict=True):
                buffer[row, :, : view.kept] = layer[part][0]

    def check_room(self, needed: int) -> None:
        """Raises ValueError if so many continuation tokens do not fit."""
        if self.room < needed:
            raise ValueError(f"the cache has room for {self.room} continuation tokens, not {needed}")

    def place(self, step_B: Tensor, num_tokens: int) -> SlotIndex:
        """Q = `num_tokens` tokens of each row, the first of them being continuation token `step_B`."""
        steps_BQ = step_B.unsqueeze(1) + self.step_R[:num_tokens]
        slots_BQ = steps_BQ + self.kept_B.unsqueeze(1)
        if self.backend == "triton":
            stored_B = self.kept_B + step_B + num_tokens
            return SlotIndex(self.rows_B1, steps_BQ, slots_BQ, None, stored_B, self.span)
        hidden_BQS = self.slot_S > slots_BQ.unsqueeze(2)
        if self.span is not None:
            # Behind the sinks a prefix's entries are its last: slots are as far apart as positions.
            beyond_BQS = self.slot_S <= slots_BQ.unsqueeze(2) - self.span.recent
            hidden_BQS = hidden_BQS | (beyond_BQS & (self.slot_S >= self.span.sinks))
        mask_BQS = torch.where(hidden_BQS, self.hidden, self.seen)
        mask_B1MS = mask_BQS.unsqueeze(1)
        if self.geometry.groups > 1:
            mask_B1MS = mask_B1MS.repeat(1, 1, self.geometry.groups, 1)
        return SlotIndex(self.rows_B1, steps_BQ, slots_BQ, mask_B1MS, None)

    def write(self, layer: int, keys_BQHD: Tensor, values_BQHD: Tensor, place: SlotIndex) -> None:
        self.keys[layer].transpose(1, 2)[place.rows_B1, place.slots_BQ] = keys_BQHD
        self.values[layer].transpose(1, 2)[place.rows_B1, place.slots_BQ] = values_BQHD


def capacity_of(view: View, entries: int) -> int:
    """A capacity for a view that keeps up to `entries`: its budget, so that short prefixes share shapes."""
    return slots_for(entries) if view.budget == "full" else view.budget


def slots_for(entries: int) -> int:
    """A capacity for full views of up to `entries`."""
    return -(-entries // ROUND_SLOTS) * ROUND_SLOTS
