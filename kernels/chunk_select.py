"""`chunk_topk` on the device: score the prefix chunks, pick the best, compact the kept KV. Three launches.

Shape legend: B batch rows, H key/value heads, S prefix length, C = S // 8 chunks, N kept entries, D head
width.

Maths, with q = keys[S - 1] (the query proxy) and chunk c = keys[8c : 8c + 8]:

    score[c] = Σ_d q[d] · (Σ_j keys[8c + j, d]) / 8        score[0] = +inf
    kept     = the (budget - tail) // 8 chunks of highest score, ties to the lower index, then the tail
    index    = 8c + (0..7) for kept c in ascending order, then the last S mod 8 positions

There is no gradient: a view is selected on detached keys.

1. `_score` reads K once, in tiles of whole chunks, and writes [B, H, C] fp32 scores.
2. `_pick` has one program for a (row, head). It finds the score of rank `num_kept` by bisection over the
   bits of the scores, which are mapped to integers of the same order; a running count over the equal ones
   breaks ties. That gives the positions in ascending order without a sort, which at a few thousand chunks
   would cost more than reading K.
3. `_gather` reads the kept entries of K and V and writes them densely, both in one pass. It takes any
   indices, so that it serves the other policies too.

What is exact: the choice given the scores, NaN (greater than +inf, as `torch.sort` has it) and signed zeros
included; the copy; and that chunks of equal content score equally, so that their tie goes to the lower index.
The keys of a chunk are added in the oracle's order, in fp32, whatever the input's type. The sum over D has a
fixed order, but not that of the oracle's matrix product: where two scores differ by less than the rounding
error of such a sum, about D · 2⁻²⁴ · Σ_d |q[d]| · |mean[d]|, the two may choose differently. Where products
and sums are exact in fp32 (small integers), they never do.

Memory: beyond the outputs, 4 bytes a chunk and head for the scores (1/256 of K at D = 64, fp16). Inputs may
be strided views in any way; nothing is copied to make them dense.

Why not torch: the oracle makes an fp32 copy of K, reads that again, sorts twice and gathers through an index
expanded to [B, H, N, D]. Whether that matters beside the prefill is for the benchmark to say.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import CHUNK

SCORE_TILE = 2048  # elements of K that a scoring program reads, times the 8 keys of a chunk
GATHER_TILE = 4096  # elements of K (and as many of V) that a gathering program copies


# Lengths differ from prompt to prompt: specialising on them would compile again and again.
@triton.jit(do_not_specialize=["last", "C"])
def _score(  # type: ignore[no-untyped-def]
    keys, scores, stride_b, stride_h, stride_s, stride_d, last, C, D,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    chunk = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    base = keys + row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    query = tl.load(base + last.to(tl.int64) * stride_s + d * stride_d, mask=d < D, other=0.0)
    # One slice holds the j-th key of every chunk: adding slices needs no exchange between threads.
    slice_CD = base + (chunk.to(tl.int64) * CHUNK * stride_s)[:, None] + (d * stride_d)[None, :]
    inside_CD = (chunk < C)[:, None] & (d < D)[None, :]
    total_CD = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for j in tl.static_range(CHUNK):
        total_CD += tl.load(slice_CD + j * stride_s, mask=inside_CD, other=0.0).to(tl.float32)
    score_C = tl.sum((total_CD / CHUNK) * query.to(tl.float32)[None, :], axis=1)
    scores_row = scores + (row.to(tl.int64) * tl.num_programs(1) + head) * C
    tl.store(scores_row + chunk, score_C, mask=chunk < C)


@triton.jit(do_not_specialize=["S", "C", "num_kept", "num_tail"])
def _pick(  # type: ignore[no-untyped-def]
    scores, indices, S, C, num_kept, num_tail,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK_C)
    inside = chunk < C
    score = tl.load(scores + row * C + chunk, mask=inside, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0 equals +0, but its bits do not
    bits = score.to(tl.int32, bitcast=True)
    # Negative floats order backwards by their bits: flip all but the sign.
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(score != score, 0x7FFFFFFF, rank)
    rank = tl.where(chunk == 0, 0x7F800000, rank)  # +inf
    rank = tl.where(inside, rank, -0x80000000)

    # The highest threshold that at least num_kept ranks reach, bit by bit from the sign down.
    threshold = tl.where(tl.sum((rank >= 0).to(tl.int32), axis=0) >= num_kept, 0, -0x80000000)
    for bit in range(31):
        candidate = threshold | (1 << (30 - bit))
        reached = tl.sum((rank >= candidate).to(tl.int32), axis=0) >= num_kept
        threshold = tl.where(reached, candidate, threshold)

    above = rank > threshold
    level = inside & (rank == threshold)
    wanted = num_kept - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= wanted))
    place = (tl.cumsum(kept.to(tl.int32), axis=0) - 1) * CHUNK

    indices_row = indices + row * (num_kept * CHUNK + num_tail)
    for j in tl.static_range(CHUNK):
        tl.store(indices_row + place + j, (chunk * CHUNK + j).to(tl.int64), mask=kept)
    tail = tl.arange(0, CHUNK)
    tail_index = (S - num_tail + tail).to(tl.int64)
    tl.store(indices_row + num_kept * CHUNK + tail, tail_index, mask=tail < num_tail)


@triton.jit(do_not_specialize=["N"])
def _gather(  # type: ignore[no-untyped-def]
    keys, values, indices, kept_keys, kept_values,
    key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d, index_b, index_h, index_n,
    N, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (n < N)[:, None] & (d < D)[None, :]
    position = tl.load(indices + row * index_b + head * index_h + n * index_n, mask=n < N, other=0)[:, None]
    key = keys + row * key_b + head * key_h + position * key_s + (d * key_d)[None, :]
    value = values + row * value_b + head * value_h + position * value_s + (d * value_d)[None, :]
    kept = ((row * tl.num_programs(1) + head) * N + n)[:, None] * D + d[None, :]
    tl.store(kept_keys + kept, tl.load(key, mask=inside, other=0.0), mask=inside)
    tl.store(kept_values + kept, tl.load(value, mask=inside, other=0.0), mask=inside)


def chunk_indices(keys_BHSD: Tensor, budget: int, keep_tail: bool = True) -> Tensor:
    """Prefix entries that `chunk_topk` keeps, as ascending int64 indices [B, H, N], N <= budget.

    Args:
        keep_tail: keep the last S mod 8 keys, which fill no chunk and count towards the budget.

    Raises:
        ValueError: where chunk 0 and the tail do not fit into the budget.
    """
    B, H, S, D = keys_BHSD.shape
    C, tail = divmod(S, CHUNK)
    num_tail = tail if keep_tail else 0
    if budget < CHUNK + num_tail:
        raise ValueError(
            f"budget {budget} does not hold chunk 0 and the tail; give at least {CHUNK + num_tail}"
        )
    num_kept = min((budget - num_tail) // CHUNK, C)
    indices_BHN = keys_BHSD.new_empty(B, H, num_kept * CHUNK + num_tail, dtype=torch.long)
    if indices_BHN.numel() == 0:
        return indices_BHN
    scores_BHC = keys_BHSD.new_empty(B, H, C, dtype=torch.float32)
    block_d = triton.next_power_of_2(D)
    block_c = max(1, SCORE_TILE // block_d)
    if C:
        _score[(triton.cdiv(C, block_c), H, B)](
            keys_BHSD, scores_BHC, *keys_BHSD.stride(), S - 1, C, D,
            CHUNK=CHUNK, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    block_c = triton.next_power_of_2(max(C, 2))
    _pick[(B * H,)](
        scores_BHC, indices_BHN, S, C, num_kept, num_tail,
        CHUNK=CHUNK, BLOCK_C=block_c, num_warps=min(16, max(4, block_c // 512)),
    )  # fmt: skip
    return indices_BHN


def gather_kept(keys_BHSD: Tensor, values_BHSD: Tensor, indices_BHN: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of K and V at the indices of any policy, as two dense tensors [B, H, N, D].

    Indices are not checked: an index outside 0..S-1 reads outside the tensors.

    Raises:
        ValueError: where keys and values differ in shape.
    """
    if keys_BHSD.shape != values_BHSD.shape:
        raise ValueError(
            f"keys {tuple(keys_BHSD.shape)} and values {tuple(values_BHSD.shape)} differ in shape"
        )
    B, H, _, D = keys_BHSD.shape
    N = indices_BHN.shape[2]
    kept_keys_BHND, kept_values_BHND = keys_BHSD.new_empty(B, H, N, D), values_BHSD.new_empty(B, H, N, D)
    if kept_keys_BHND.numel() == 0:
        return kept_keys_BHND, kept_values_BHND
    block_d = triton.next_power_of_2(D)
    block_n = max(1, GATHER_TILE // block_d)
    _gather[(triton.cdiv(N, block_n), H, B)](
        keys_BHSD, values_BHSD, indices_BHN, kept_keys_BHND, kept_values_BHND,
        *keys_BHSD.stride(), *values_BHSD.stride(), *indices_BHN.stride(), N, D,
        BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return kept_keys_BHND, kept_values_BHND


def chunk_select(
    keys_BHSD: Tensor, values_BHSD: Tensor, budget: int, keep_tail: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept keys and values [B, H, N, D] of `chunk_topk`, and their indices [B, H, N]."""
    indices_BHN = chunk_indices(keys_BHSD, budget, keep_tail)
    return *gather_kept(keys_BHSD, values_BHSD, indices_BHN), indices_BHN
