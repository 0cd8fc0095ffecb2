"""How much of the last tokens' attention falls on each chunk of a prefix: the scores of `target_guided`.

Shape legend: B batch rows, H key/value heads, G query heads per key/value head, W last tokens, M = G·W query
rows of one key/value head, S prefix length, C = S // 8 chunks, P shares of the keys, D head width.

Maths: query i of the W last tokens sees positions 0 .. S - W + i, and chunk c is positions 8c .. 8c + 7:

    w[i, j] = softmax over the seen j of scaling · query[i] · key[j]
    share[c] = Σ_{j in c} mean over heads and i of w[i, j]

1. `_scan` reads K once: a program takes a tile of the M rows of one (row, head) and one of P equal shares of
   the keys, and leaves the maximum and the sum of exponentials of each query row.
2. `_share` reads K once more: a program takes a few chunks of one row, goes through all heads, and adds up
   what their queries give to each key. No atomics: the same input gives the same bits.

Between them torch joins the P parts of each query row, which are few. Products are computed in the input's
type (fp32: without TF32) and added in fp32. There is no gradient: chunks are chosen, not weighed.

Memory: beyond the output, 2·B·H·M·P and then B·H·M fp32 values; no scores of all keys, no copy of K, nothing
repeated per query head. Inputs may be strided views in any way.

Why not torch: the oracle makes an fp32 copy of K and several [B, H, M, S] tensors of scores and weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import CHUNK

KEYS_PER_SHARE = 1024
LOG2_E = 1.4426950408889634


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    query, key, query_g, query_w, query_d, key_s, key_d, m, position, scale_log2, S, G, W, D,
    UPCAST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores [N, M] in units of log 2; -inf where a query does not see a key, or there is neither."""
    d = tl.arange(0, BLOCK_D)
    group, token = m // W, m % W
    row_M = query + group * query_g + token * query_w
    query_DM = tl.load(
        row_M[None, :] + (d * query_d)[:, None], mask=(m < G * W)[None, :] & (d < D)[:, None], other=0.0
    )
    key_ND = tl.load(
        key + (position.to(tl.int64) * key_s)[:, None] + (d * key_d)[None, :],
        mask=(position < S)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    if UPCAST:
        query_DM, key_ND = query_DM.to(tl.float32), key_ND.to(tl.float32)
    logits = tl.dot(key_ND, query_DM, input_precision="ieee") * scale_log2
    seen = (position[:, None] <= (S - W + token)[None, :]) & (m < G * W)[None, :]
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=["S"])
def _scan(  # type: ignore[no-untyped-def]
    query, key, top, total,
    query_b, query_h, query_g, query_w, query_d, key_b, key_h, key_s, key_d, scale_log2, S, H, G, W, D,
    UPCAST: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile, split, row_head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, head = row_head // H, row_head % H
    query += row * query_b + head * query_h
    key += row * key_b + head * key_h
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    for start in range(split * SHARE, tl.minimum(split * SHARE + SHARE, S), BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        logits = _logits(
            query, key, query_g, query_w, query_d, key_s, key_d, m, position, scale_log2, S, G, W, D,
            UPCAST, BLOCK_D,
        )  # fmt: skip
        higher_M = tl.maximum(top_M, tl.max(logits, axis=0))
        # A query that has seen nothing yet has no maximum to subtract: -inf - -inf would be NaN.
        shift_M = tl.where(higher_M == float("-inf"), 0.0, higher_M)
        total_M = total_M * tl.exp2(top_M - shift_M) + tl.sum(tl.exp2(logits - shift_M[None, :]), axis=0)
        top_M = higher_M
    place = (row_head * (G * W) + m) * tl.num_programs(1) + split
    tl.store(top + place, top_M, mask=m < G * W)
    tl.store(total + place, total_M, mask=m < G * W)


@triton.jit(do_not_specialize=["S", "C"])
def _share(  # type: ignore[no-untyped-def]
    query, key, norm, shares,
    query_b, query_h, query_g, query_w, query_d, key_b, key_h, key_s, key_d, scale_log2, S, C, H, G, W, D,
    UPCAST: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position = block * BLOCK_N + tl.arange(0, BLOCK_N)
    given_N = tl.zeros([BLOCK_N], tl.float32)
    for head in range(H):
        for tile in range(0, G * W, BLOCK_M):
            m = tile + tl.arange(0, BLOCK_M)
            logits = _logits(
                query + row * query_b + head * query_h, key + row * key_b + head * key_h,
                query_g, query_w, query_d, key_s, key_d, m, position, scale_log2, S, G, W, D,
                UPCAST, BLOCK_D,
            )  # fmt: skip
            norm_M = tl.load(norm + (row * H + head) * (G * W) + m, mask=m < G * W, other=0.0)
            given_N += tl.sum(tl.exp2(logits - norm_M[None, :]), axis=1)
    share = tl.sum(tl.reshape(given_N, [BLOCK_N // CHUNK, CHUNK]), axis=1) / (H * G * W)
    chunk = block * (BLOCK_N // CHUNK) + tl.arange(0, BLOCK_N // CHUNK)
    tl.store(shares + row * C + chunk, share, mask=chunk < C)


def chunk_attention(queries_BHGWD: Tensor, keys_BHSD: Tensor, scaling: float) -> Tensor:
    """The share [B, C] of each whole chunk in the attention of the last W of S tokens, fp32.

    Raises:
        ValueError: where there are more queries than keys.
    """
    B, H, G, W, D = queries_BHGWD.shape
    S = keys_BHSD.shape[2]
    if W > S:
        raise ValueError(f"{W} queries are of the last tokens, and there are keys of {S}")
    C = S // CHUNK
    shares_BC = keys_BHSD.new_empty(B, C, dtype=torch.float32)
    if shares_BC.numel() == 0:
        return shares_BC
    block_d = max(16, triton.next_power_of_2(D))
    wide = keys_BHSD.dtype == torch.float32
    block_m = min(32 if wide else 64, max(16, triton.next_power_of_2(G * W)))
    block_n = max(16, (4096 if wide else 8192) // max(64, block_d))
    # The interpreter's bfloat16 products are wrong.
    upcast = keys_BHSD.dtype == torch.bfloat16 and not keys_BHSD.is_cuda
    shape = (*queries_BHGWD.stride(), *keys_BHSD.stride(), scaling * LOG2_E, S)
    splits = triton.cdiv(S, KEYS_PER_SHARE)
    top, total = keys_BHSD.new_empty(2, B * H, G * W, splits, dtype=torch.float32)
    _scan[(triton.cdiv(G * W, block_m), splits, B * H)](
        queries_BHGWD, keys_BHSD, top, total, *shape, H, G, W, D,
        UPCAST=upcast, SHARE=KEYS_PER_SHARE, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    highest = top.amax(-1, keepdim=True)
    norm = highest.squeeze(-1) + ((top - highest).exp2() * total).sum(-1).log2()
    _share[(triton.cdiv(C * CHUNK, block_n), B)](
        queries_BHGWD, keys_BHSD, norm, shares_BC, *shape, C, H, G, W, D,
        UPCAST=upcast, CHUNK=CHUNK, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return shares_BC
