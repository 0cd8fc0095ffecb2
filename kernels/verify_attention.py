"""Attention of a few new tokens over a long stored cache, split over the keys: verification and decoding.

Shape legend: B batch rows, H key/value heads, G query heads per key/value head, Q query tokens (1-128),
S capacity of the buffers, D head width, M = G·Q query rows of one key/value head, P splits of the keys.

Maths: the Q queries are the last Q of the n stored tokens (n = `length`, for each row its own). Query i sees
positions 0 .. n - Q + i:

    out[i] = Σ_j w[i, j] · value[j]        w[i, ·] = softmax over the seen j of scaling · query[i] · key[j]

Through a window of S sinks and R recent tokens it sees, of those, the first S and its own last R. What no
query of the call sees is not read.

1. `_attend_split`: a program takes a tile of the M rows of one (row, head) and one of P equal shares of the
   n keys, and runs the online softmax over them. It leaves its sum of values, unnormalised, with its maximum
   and its denominator, in fp32.
2. `_merge_splits`: a program for each query row rescales the P parts to their common maximum and adds them in
   a fixed order. No atomics: the same input gives the same bits.

All G query heads of a key/value head share the tile, so K and V are read from memory once for each key/value
head where M <= 64 (fp32: 32). Larger M takes several tiles, which run side by side on the same keys and
share them through the L2 cache.

Products are computed in the input's type (fp32: without TF32) and added in fp32; the weights are rounded to
the type of V before they meet it, as flash attention does. There is no gradient: the cache is decoded over,
not trained through.

The grid and P depend on the capacity S alone, and `length` may stay on the device: a captured CUDA graph
replays while the cache grows. Nothing beyond `length` is read, whatever it holds. The host never waits.

Memory: beyond the output, B·H·M·P·(D + 2) fp32 values, with P at most `MAX_SPLITS` and at most S / 256. No
mask, no copy of K or V, nothing repeated per query head.

Why not torch: `scaled_dot_product_attention` takes an explicit [Q, S] mask for this alignment and a host
integer for the length (the slice of the buffer), which a graph freezes; flex attention takes the length
through a block mask, which must be rebuilt as the cache grows. Benchmark both beside this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 128
MIN_KEYS = 256  # keys that make a split worth its part of the merge
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: `block_m` query rows and `block_n` keys at a time, keys in `splits` shares."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["length", "sinks", "recent"])
def _attend_split(  # type: ignore[no-untyped-def]
    query, key, value, length, sinks, recent, part, top, total,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    length_b, scale_log2, H, G, Q, D,
    LENGTH_ON_DEVICE: tl.constexpr, ROLLS: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Tiles of the same keys are neighbours in the grid, so that they find each other's keys in L2.
    tile, split, row_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, head = row_head // H, row_head % H
    stored = tl.load(length + row * length_b).to(tl.int32) if LENGTH_ON_DEVICE else length
    share = tl.cdiv(tl.cdiv(stored, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, stored)

    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside_M, inside_D = m < G * Q, d < D
    group, token = m // Q, m % Q
    last_M = stored - Q + token  # the last position that a row sees
    row_M = query + row * query_b + (head * G + group) * query_h + token * query_q
    query_MD = tl.load(
        row_M[:, None] + (d * query_d)[None, :], mask=inside_M[:, None] & inside_D[None, :], other=0.0
    )
    if UPCAST:
        query_MD = query_MD.to(tl.float32)
    key_DN = key + row * key_b + head * key_h + (d * key_d)[:, None]
    value_ND = value + row * value_b + head * value_h + (d * value_d)[None, :]

    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    sum_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + n
        at = position.to(tl.int64)
        here = position < end
        if ROLLS:
            here = here & ((position < sinks) | (position > stored - Q - recent))
        keys = tl.load(key_DN + (at * key_s)[None, :], mask=inside_D[:, None] & here[None, :], other=0.0)
        values = tl.load(
            value_ND + (at * value_s)[:, None], mask=here[:, None] & inside_D[None, :], other=0.0
        )
        if UPCAST:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(query_MD, keys, input_precision="ieee") * scale_log2
        seen = position[None, :] <= last_M[:, None]
        if ROLLS:
            seen = seen & ((position < sinks)[None, :] | (position[None, :] > last_M[:, None] - recent))
        logits = tl.where(seen, logits, float("-inf"))
        higher_M = tl.maximum(top_M, tl.max(logits, axis=1))
        # A row that has seen nothing yet has no maximum to subtract: -inf - -inf would be NaN.
        shift_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
        weights = tl.exp2(logits - shift_M[:, None])
        rescale_M = tl.exp2(top_M - shift_M)
        total_M = total_M * rescale_M + tl.sum(weights, axis=1)
        sum_MD = sum_MD * rescale_M[:, None]
        sum_MD = tl.dot(weights.to(values.dtype), values, sum_MD, input_precision="ieee")
        top_M = higher_M

    place = (row_head * (G * Q) + m) * SPLITS + split
    tl.store(top + place, top_M, mask=inside_M)
    tl.store(total + place, total_M, mask=inside_M)
    tl.store(part + place[:, None] * D + d[None, :], sum_MD, mask=inside_M[:, None] & inside_D[None, :])


@triton.jit
def _merge_splits(  # type: ignore[no-untyped-def]
    part, top, total, out, out_b, out_h, out_q, H, G, Q, D,
    SPLITS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m, row_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = row_head // H, row_head % H
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    place = (row_head * (G * Q) + m) * SPLITS + p
    top_P = tl.load(top + place, mask=p < SPLITS, other=float("-inf"))
    highest = tl.max(top_P, axis=0)
    weight_P = tl.exp2(top_P - tl.where(highest == float("-inf"), 0.0, highest))
    denominator = tl.sum(weight_P * tl.load(total + place, mask=p < SPLITS, other=0.0), axis=0)
    inside_PD = (p < SPLITS)[:, None] & (d < D)[None, :]
    part_PD = tl.load(part + place[:, None] * D + d[None, :], mask=inside_PD, other=0.0)
    out_D = tl.sum(weight_P[:, None] * part_PD, axis=0) / tl.where(denominator == 0.0, 1.0, denominator)
    out_row = out + row * out_b + (head * G + m // Q) * out_h + (m % Q) * out_q
    tl.store(out_row + d, out_D.to(out.dtype.element_ty), mask=d < D)


@cache
def choose_splits(capacity: int, num_tiles: int, num_slots: int) -> int:
    """Shares of the keys that fill the device: the fewest within a tenth of the best use of its slots.

    Args:
        capacity: most tokens that the cache will hold.
        num_tiles: programs for each share.
        num_slots: programs that the device runs at once.
    """
    most = max(1, min(MAX_SPLITS, capacity // MIN_KEYS))

    def use(splits: int) -> float:
        waves = triton.cdiv(num_tiles * splits, num_slots)
        return num_tiles * splits / (waves * num_slots)

    best = max(use(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if use(splits) >= 0.9 * best)


@cache
def _num_slots(device: torch.device) -> int:
    # Two programs of these tile sizes fit a multiprocessor. A CPU stands for the interpreter.
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def choose_tiles(num_rows: int, capacity: int, num_row_heads: int, query: Tensor) -> Tiles:
    """The default cut for M query rows against `capacity` keys in B·H pairs of row and head.

    The sizes are the largest that compile for compute capability 9.0 at D = 128 without spilling registers.
    fp32 has no tensor cores without TF32, and keeps its operands in registers.
    """
    wide = query.dtype == torch.float32
    block_m = min(32 if wide else 64, max(16, triton.next_power_of_2(num_rows)))
    num_tiles = triton.cdiv(num_rows, block_m) * num_row_heads
    return Tiles(
        block_m=block_m,
        block_n=max(16, (2048 if wide else 8192) // max(128, triton.next_power_of_2(query.shape[-1]))),
        splits=choose_splits(capacity, num_tiles, _num_slots(query.device)),
        num_warps=8 if wide else 4,
        num_stages=3,
    )


def verify_attention(
    query: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    scaling: float,
    length: int | Tensor,
    tiles: Tiles | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention of the last Q of the first `length` stored tokens; each sees itself and all before it.

    A query that sees nothing (its place is before the first token) gives zeros, so that a row of length 0 is
    an idle one.

    Args:
        query: [B, H·G, Q, D], the query heads of one key/value head side by side; any strides.
        key_BHSD: buffers of capacity S >= length, of the type of `query`; any strides.
        length: tokens stored: an int, or an integer tensor on the device of `query`, 0-d or [B] for rows of
            different lengths. What a tensor holds is not checked: that would wait for the device.
        tiles: how the work is cut; `choose_tiles` where none are given.
        window: sinks and recent tokens that a query sees; all where there is none.

    Returns:
        [B, H·G, Q, D] in the type of `query`, stored as [B, Q, H·G, D].

    Raises:
        ValueError: for shapes, types or an integer length that do not fit together.
    """
    B, heads, Q, D = query.shape
    H, S = key_BHSD.shape[1], key_BHSD.shape[2]
    if key_BHSD.shape != (B, H, S, D) or value_BHSD.shape != (B, H, S, D) or heads % H:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key_BHSD.shape)} and value {tuple(value_BHSD.shape)} "
            "are not [B, H·G, Q, D], [B, H, S, D] and [B, H, S, D]"
        )
    if not query.dtype == key_BHSD.dtype == value_BHSD.dtype:
        raise ValueError(
            f"query, key and value have different types: {query.dtype}, {key_BHSD.dtype}, {value_BHSD.dtype}"
        )
    on_device = isinstance(length, Tensor)
    if isinstance(length, Tensor):
        if length.shape not in ((), (B,)):
            raise ValueError(f"length has shape {tuple(length.shape)}: give an int, a 0-d tensor or [{B}]")
    elif not Q <= length <= S:
        raise ValueError(f"length {length} is not between the {Q} queries and the capacity {S}")

    G = heads // H
    tiles = tiles or choose_tiles(G * Q, S, B * H, query)
    block_d = max(16, triton.next_power_of_2(D))
    part = query.new_empty(B * H, G * Q, tiles.splits, D, dtype=torch.float32)
    top, total = query.new_empty(2, B * H, G * Q, tiles.splits, dtype=torch.float32)
    _attend_split[(triton.cdiv(G * Q, tiles.block_m), tiles.splits, B * H)](
        query, key_BHSD, value_BHSD, length, *(window or (0, 0)), part, top, total,
        *query.stride(), *key_BHSD.stride(), *value_BHSD.stride(),
        length.stride(0) if isinstance(length, Tensor) and length.dim() else 0,
        scaling * LOG2_E, H, G, Q, D,
        LENGTH_ON_DEVICE=on_device,
        ROLLS=window is not None,
        UPCAST=query.dtype == torch.bfloat16 and not query.is_cuda,  # the interpreter's bf16 dot is wrong
        SPLITS=tiles.splits, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    out_BQhD = query.new_empty(B, Q, heads, D)
    out = out_BQhD.transpose(1, 2)
    _merge_splits[(G * Q, B * H)](
        part, top, total, out, *out.stride()[:3], H, G, Q, D,
        SPLITS=tiles.splits, BLOCK_P=triton.next_power_of_2(tiles.splits), BLOCK_D=block_d,
        num_warps=4,
    )  # fmt: skip
    return out
