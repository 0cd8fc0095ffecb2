"""The Triton backend of `distill_loss.py`, with its shapes; S splits of V.

`forward`: `_partial_lse` multiplies a block of positions with blocks of the head and keeps a running maximum
and sum; `_listed_logits` multiplies with the K listed rows alone. `dlogits`: `_dlogits` writes ∂z of one
tile, and `_place_labels` overwrites the listed entries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import distill_tiles

SPLIT_V = 1024  # vocabulary entries that one forward program goes through
BLOCK_T, BLOCK_V = 128, 128


@triton.jit
def _logits_block(  # type: ignore[no-untyped-def]
    hidden, head, row, column, T, V, H, inverse_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """fp32 logits [BLOCK_T, BLOCK_V] of these rows and columns, 0 where there are none."""
    z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside_t = (row < T)[:, None] & (h < H)[None, :]
        inside_v = (column < V)[None, :] & (h < H)[:, None]
        x = tl.load(hidden + row.to(tl.int64)[:, None] * H + h[None, :], mask=inside_t, other=0.0)
        w = tl.load(head + column.to(tl.int64)[None, :] * H + h[:, None], mask=inside_v, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        z = tl.dot(x, w, acc=z, input_precision=PRECISION)
    return z * inverse_temperature


@triton.jit
def _partial_lse(  # type: ignore[no-untyped-def]
    hidden, head, partial, T, V, H, inverse_temperature,
    SPLIT_V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Programs that differ in positions alone run side by side and share their part of the head in L2.
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    largest = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in range(split * SPLIT_V, min(split * SPLIT_V + SPLIT_V, V), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        z = _logits_block(
            hidden, head, row, column, T, V, H, inverse_temperature,
            BLOCK_T, BLOCK_V, BLOCK_H, PRECISION, UPCAST,
        )  # fmt: skip
        z = tl.where((column < V)[None, :], z, float("-inf"))
        grown = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp(largest - grown) + tl.sum(tl.exp(z - grown[:, None]), 1)
        largest = grown
    tl.store(partial + split.to(tl.int64) * T + row, largest + tl.log(total), mask=row < T)


@triton.jit
def _listed_logits(  # type: ignore[no-untyped-def]
    hidden, head, ids, listed, V, H, K, inverse_temperature,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.load(ids + row * K + k, mask=k < K, other=0)
    exists = (column >= 0) & (column < V)
    z = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        x = tl.load(hidden + row * H + h, mask=h < H, other=0.0).to(tl.float32)
        inside = exists[:, None] & (h < H)[None, :]
        w = tl.load(head + column[:, None] * H + h[None, :], mask=inside, other=0.0).to(tl.float32)
        z += tl.sum(w * x[None, :], 1)
    tl.store(listed + row * K + k, tl.where(exists, z * inverse_temperature, float("nan")), mask=k < K)


@triton.jit
def _dlogits(  # type: ignore[no-untyped-def]
    hidden, head, lse, mass, dz, T, V, H, inverse_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z = _logits_block(
        hidden, head, row, column, T, V, H, inverse_temperature,
        BLOCK_T, BLOCK_V, BLOCK_H, PRECISION, UPCAST,
    )  # fmt: skip
    lse_t = tl.load(lse + row, mask=row < T, other=0.0)
    mass_t = tl.load(mass + row, mask=row < T, other=0.0)
    inside = (row < T)[:, None] & (column < V)[None, :]
    value = mass_t[:, None] * tl.exp(tl.where(inside, z - lse_t[:, None], float("-inf")))
    place = row.to(tl.int64)[:, None] * V + column[None, :]
    tl.store(dz + place, value.to(dz.dtype.element_ty), mask=inside)


@triton.jit
def _place_labels(  # type: ignore[no-untyped-def]
    dz, places, listed, count, V, K, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(places + entry, mask=entry < count, other=-1)
    value = tl.load(listed + entry, mask=entry < count, other=0.0)
    inside = (column >= 0) & (column < V)
    tl.store(dz + entry // K * V + column, value.to(dz.dtype.element_ty), mask=inside)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no GPU."""
    return bool(triton.knobs.runtime.interpret)


def _launch(dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes and precision of the matrix products: a first choice for Hopper, to be tuned on one."""
    single = dtype == torch.float32
    return {
        "BLOCK_T": BLOCK_T,
        "BLOCK_V": BLOCK_V,
        "BLOCK_H": 32 if single else 64,
        # Three tf32 products come close to an fp32 one; a single tf32 would lose 13 bits of each input.
        "PRECISION": "tf32x3" if single else "ieee",
        # The interpreter multiplies bf16 wrongly.
        "UPCAST": interpreted() and dtype == torch.bfloat16,
        "num_warps": 8,
        "num_stages": 3,
    }


def forward(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """As `distill_tiles.forward`."""
    (T, H), V, K = hidden_TH.shape, head_VH.shape[0], ids_TK.shape[1]
    num_splits = triton.cdiv(V, SPLIT_V)
    lse_T = torch.empty(T, dtype=torch.float32, device=hidden_TH.device)
    # The slice of positions bounds the partial results, two of which exist while they are combined.
    for rows in distill_tiles.slices(T, max(BLOCK_T, distill_tiles.SCRATCH_BYTES // (8 * num_splits))):
        hidden_tH = hidden_TH[rows]
        partial_St = torch.empty(num_splits, len(hidden_tH), dtype=torch.float32, device=hidden_TH.device)
        _partial_lse[(triton.cdiv(len(hidden_tH), BLOCK_T), num_splits)](
            hidden_tH, head_VH, partial_St, len(hidden_tH), V, H, inverse_temperature,
            SPLIT_V=SPLIT_V, **_launch(hidden_TH.dtype),
        )  # fmt: skip
        lse_T[rows] = partial_St.logsumexp(0)
    listed_TK = torch.empty(T, K, dtype=torch.float32, device=hidden_TH.device)
    block_K = min(16, triton.next_power_of_2(K))
    _listed_logits[(T, triton.cdiv(K, block_K))](
        hidden_TH, head_VH, ids_TK, listed_TK, V, H, K, inverse_temperature, BLOCK_K=block_K, BLOCK_H=128
    )
    return lse_T, listed_TK


def dlogits(
    hidden_tH: Tensor,
    head_vH: Tensor,
    lse_t: Tensor,
    mass_t: Tensor,
    places_tK: Tensor,
    listed_tK: Tensor,
    inverse_temperature: float,
) -> Tensor:
    """As `distill_tiles.dlogits`."""
    (t, H), v = hidden_tH.shape, head_vH.shape[0]
    dz_tv = torch.empty(t, v, dtype=hidden_tH.dtype, device=hidden_tH.device)
    _dlogits[(triton.cdiv(t, BLOCK_T), triton.cdiv(v, BLOCK_V))](
        hidden_tH, head_vH, lse_t, mass_t, dz_tv, t, v, H, inverse_temperature, **_launch(hidden_tH.dtype)
    )
    count, K = places_tK.numel(), places_tK.shape[1]
    _place_labels[(triton.cdiv(count, 1024),)](dz_tv, places_tK, listed_tK, count, v, K, BLOCK=1024)
    return dz_tv
