"""Losses of the drafter from hidden states and head, without logits of all positions. fp32 throughout.

Shape legend: T positions, H hidden width, V vocabulary, K listed tokens of a position, S splits of V.

Every loss here is a small function of the log-probabilities of K listed tokens (the target's arg-max, K = 1,
or its stored top K), so that one operation carries all of them and the rest is ordinary autograd on [T, K]:

    z[t, v] = hidden[t] · head[v] / temperature        L[t] = log Σ_v exp z[t, v]
    log q[t, k] = z[t, ids[t, k]] - L[t]

Gradient, for g = ∂loss/∂log q and c[t] = -Σ_k g[t, k]:

    ∂loss/∂z[t, v] = c[t] · exp(z[t, v] - L[t]) + Σ_k g[t, k] · [v = ids[t, k]]
    ∂loss/∂hidden = ∂z · head / temperature            ∂loss/∂head = ∂zᵀ · hidden / temperature

Forward: `_partial_lse` multiplies a block of positions with blocks of the head and keeps a running maximum
and sum; `_listed_logits` multiplies with the K listed rows alone. Nothing of size T × V is written.

Backward: tiles of positions × vocabulary. `_dlogits` multiplies again and writes ∂z of one tile in the
inputs' type, `_place_labels` overwrites the listed entries, which were summed in fp32 (where q is near 1, the
difference c·q + g would not survive a half-precision c·q), and cuBLAS forms both products. A purely Triton
backward would multiply twice more or add atomically, since a gradient tile as wide as H does not fit on chip.
∂z is scaled into [-1024, 1024] first, so that fp16 holds a gradient divided by thousands of positions.

Memory beyond inputs, outputs and [T, K]: at most SCRATCH_BYTES whatever T and V are, and, for half-precision
inputs, an fp32 copy of ∂hidden. The `torch` backend promises the same with the same tiles in both directions.

Liger-Kernel (November 2026) has fused linear cross entropy (`LigerFusedLinearCrossEntropyLoss`), and fused
linear JSD and KL against a teacher's hidden states and head or its full distribution
(`LigerFusedLinearJSD`, `chunked_loss`, `FusedLinearKLDivLoss`). These cut along positions only, so a chunk
spans the whole vocabulary, and compute the gradient in the forward pass for one reduced loss: three matrix
products where this file needs four. None takes stored top-K labels with a bucket for the rest, or gives a
fused linear total variation; and the per-position loss here takes any weights afterwards. Where only cross
entropy is wanted, theirs is the one to beat: the benchmark compares them.

The file is long because both backends keep the same promise with the same tiles, and stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

SCRATCH_BYTES = 256 * 2**20
SPLIT_V = 1024  # vocabulary entries that one forward program goes through
BLOCK_T, BLOCK_V = 128, 128
LARGEST_DZ = 1024.0


def cross_entropy(hidden_TH: Tensor, head_VH: Tensor, argmax_T: Tensor, *, backend: str) -> Tensor:
    """[T] cross entropy against the target's arg-max."""
    return -log_probs(hidden_TH, head_VH, argmax_T.unsqueeze(-1), 1.0, backend=backend).squeeze(-1)


def kl(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, log_p_TK: Tensor, temperature: float, *, backend: str
) -> Tensor:
    """[T] KL(p ‖ q) over the K stored entries and one bucket for the rest, as `reference.kl`."""
    log_q_TK = log_probs(hidden_TH, head_VH, ids_TK, temperature, backend=backend)
    return reference.bucketed_kl(log_q_TK, log_p_TK)


def total_variation(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, log_p_TK: Tensor, temperature: float, *, backend: str
) -> Tensor:
    """[T] 1 - Σ min(p, q) over the K stored entries and the rest's bucket, as `reference.total_variation`."""
    log_q_TK = log_probs(hidden_TH, head_VH, ids_TK, temperature, backend=backend)
    return reference.bucketed_total_variation(log_q_TK, log_p_TK)


def log_probs(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, temperature: float, *, backend: str
) -> Tensor:
    """Log-probabilities [T, K] (fp32) of the listed tokens under softmax(hidden · headᵀ / temperature).

    Differentiable in `hidden_TH` and `head_VH`, once. Under autocast both are cast as a linear layer would.

    Args:
        hidden_TH: [T, H], fp32, bf16 or fp16.
        head_VH: [V, H], the weight of the output layer, of the same type. It has no bias.
        ids_TK: [T, K] int64, distinct within a row. An id outside 0..V-1 gives NaN.
        temperature: above 0.
        backend: `triton` (CUDA, or Triton's interpreter) or `torch` (anywhere).

    Raises:
        ValueError: if shapes or types do not fit together, or the backend cannot run on the device.
    """
    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        hidden_TH, head_VH = hidden_TH.to(half), head_VH.to(half)
    _check(hidden_TH, head_VH, ids_TK, temperature, backend)
    return _LogProbs.apply(
        hidden_TH.contiguous(), head_VH.contiguous(), ids_TK.contiguous(), 1.0 / temperature, backend
    )


def _check(hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, temperature: float, backend: str) -> None:
    shapes = f"hidden {list(hidden_TH.shape)}, head {list(head_VH.shape)}, ids {list(ids_TK.shape)}"
    if hidden_TH.dim() != 2 or head_VH.dim() != 2 or ids_TK.dim() != 2:
        raise ValueError(f"expected hidden [T, H], head [V, H] and ids [T, K]: got {shapes}")
    if hidden_TH.shape[1] != head_VH.shape[1] or hidden_TH.shape[0] != ids_TK.shape[0]:
        raise ValueError(f"hidden and head must share H, hidden and ids T: got {shapes}")
    if not (hidden_TH.numel() and head_VH.numel() and ids_TK.numel()):
        raise ValueError(f"there is nothing to compute: {shapes}")
    if hidden_TH.dtype != head_VH.dtype or hidden_TH.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        raise ValueError(
            f"hidden is {hidden_TH.dtype} and head {head_VH.dtype}: cast both to float32, bfloat16 or float16"
        )
    if ids_TK.dtype != torch.int64:
        raise ValueError(f"ids must be int64, not {ids_TK.dtype}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of {sorted(_BACKENDS)}, not {backend!r}")
    if backend == "triton" and not (hidden_TH.is_cuda or _interpreted()):
        raise ValueError(f"backend 'triton' needs a GPU, and hidden is on {hidden_TH.device}: use 'torch'")


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, inverse_temperature: float, backend: str
    ) -> Tensor:
        with torch.autocast(hidden_TH.device.type, enabled=False):
            lse_T, listed_TK = _BACKENDS[backend].forward(hidden_TH, head_VH, ids_TK, inverse_temperature)
        log_q_TK = listed_TK.sub_(lse_T.unsqueeze(-1))
        ctx.save_for_backward(hidden_TH, head_VH, ids_TK, lse_T, log_q_TK)
        ctx.inverse_temperature, ctx.backend = inverse_temperature, backend
        return log_q_TK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_TH, head_VH, ids_TK, lse_T, log_q_TK = ctx.saved_tensors
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        mass_T = -grad_TK.sum(-1)
        listed_TK = log_q_TK.exp().mul_(mass_T.unsqueeze(-1)).add_(grad_TK)
        scale = torch.maximum(mass_T.abs().amax(), listed_TK.abs().amax()) / LARGEST_DZ
        scale.clamp_min_(torch.finfo(torch.float32).tiny)
        mass_T, listed_TK = mass_T / scale, listed_TK.div_(scale)
        unscale = scale * ctx.inverse_temperature

        (T, H), V = hidden_TH.shape, head_VH.shape[0]
        grad_hidden = hidden_TH.new_zeros((T, H), dtype=torch.float32) if wants_hidden else None
        grad_head = torch.empty_like(head_VH) if wants_head else None
        tile_T, tile_V = _tile_shape(T, V, H)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for columns in _slices(V, tile_V):
                head_vH = head_VH[columns]
                sum_vH = torch.zeros_like(head_vH, dtype=torch.float32) if wants_head else None
                for rows in _slices(T, tile_T):
                    dz_tv = _BACKENDS[ctx.backend].dlogits(
                        hidden_TH[rows], head_vH, lse_T[rows], mass_T[rows], ids_TK[rows] - columns.start,
                        listed_TK[rows], ctx.inverse_temperature,
                    )  # fmt: skip
                    if grad_hidden is not None:
                        _add_product(grad_hidden[rows], dz_tv, head_vH)
                    if sum_vH is not None:
                        _add_product(sum_vH, dz_tv.T, hidden_TH[rows])
                    del dz_tv  # before the next tile exists
                if grad_head is not None and sum_vH is not None:
                    grad_head[columns] = sum_vH.mul_(unscale)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(unscale).to(hidden_TH.dtype)
        return grad_hidden, grad_head, None, None, None


def _tile_shape(T: int, V: int, H: int) -> tuple[int, int]:
    """Positions and vocabulary entries of a tile, such that all its temporaries fit in SCRATCH_BYTES.

    Half is for up to four fp32 rows of width H a vocabulary entry, half for two such rows and up to three
    values a vocabulary entry (∂z or logits, its type's copy, and that one's transposed cast) a position.
    """
    tile_V = min(V, 16384, max(128, SCRATCH_BYTES // (32 * H) // 128 * 128))
    tile_T = min(T, max(16, SCRATCH_BYTES // (16 * H + 24 * tile_V) // 16 * 16))
    return tile_T, tile_V


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in place, accumulated in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.float(), right.float())


# ---- torch -------------------------------------------------------------------------------------------------


def _logits_torch(hidden_tH: Tensor, head_vH: Tensor, inverse_temperature: float) -> Tensor:
    z_tv = hidden_tH.new_zeros((len(hidden_tH), len(head_vH)), dtype=torch.float32)
    _add_product(z_tv, hidden_tH, head_vH.T)
    return z_tv.mul_(inverse_temperature)


def _within(places_tK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which listed tokens lie in a tile of `width` columns, and a column that exists for each."""
    return (places_tK >= 0) & (places_tK < width), places_tK.clamp(0, width - 1)


def _forward_torch(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    (T, H), V = hidden_TH.shape, head_VH.shape[0]
    lse_T = hidden_TH.new_full((T,), -torch.inf, dtype=torch.float32)
    listed_TK = torch.full_like(ids_TK, torch.nan, dtype=torch.float32)
    tile_T, tile_V = _tile_shape(T, V, H)
    for columns in _slices(V, tile_V):
        for rows in _slices(T, tile_T):
            z_tv = _logits_torch(hidden_TH[rows], head_VH[columns], inverse_temperature)
            inside_tK, place_tK = _within(ids_TK[rows] - columns.start, z_tv.shape[1])
            listed_TK[rows] = torch.where(inside_tK, z_tv.gather(1, place_tK), listed_TK[rows])
            largest_t = z_tv.amax(1)
            sum_t = z_tv.sub_(largest_t.unsqueeze(-1)).exp_().sum(1)
            lse_T[rows] = torch.logaddexp(lse_T[rows], largest_t + sum_t.log())
            del z_tv  # before the next tile exists
    return lse_T, listed_TK


def _dlogits_torch(
    hidden_tH: Tensor,
    head_vH: Tensor,
    lse_t: Tensor,
    mass_t: Tensor,
    places_tK: Tensor,
    listed_tK: Tensor,
    inverse_temperature: float,
) -> Tensor:
    dz_tv = _logits_torch(hidden_tH, head_vH, inverse_temperature)
    dz_tv.sub_(lse_t.unsqueeze(-1)).exp_().mul_(mass_t.unsqueeze(-1))
    inside_tK, place_tK = _within(places_tK, dz_tv.shape[1])
    change_tK = torch.where(inside_tK, listed_tK - dz_tv.gather(1, place_tK), 0.0)
    return dz_tv.scatter_add_(1, place_tK, change_tK).to(hidden_tH.dtype)


# ---- Triton ------------------------------------------------------------------------------------------------


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


def _interpreted() -> bool:
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
        "UPCAST": _interpreted() and dtype == torch.bfloat16,
        "num_warps": 8,
        "num_stages": 3,
    }


def _forward_triton(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    (T, H), V, K = hidden_TH.shape, head_VH.shape[0], ids_TK.shape[1]
    num_splits = triton.cdiv(V, SPLIT_V)
    lse_T = torch.empty(T, dtype=torch.float32, device=hidden_TH.device)
    # The slice of positions bounds the partial results, two of which exist while they are combined.
    for rows in _slices(T, max(BLOCK_T, SCRATCH_BYTES // (8 * num_splits))):
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


def _dlogits_triton(
    hidden_tH: Tensor,
    head_vH: Tensor,
    lse_t: Tensor,
    mass_t: Tensor,
    places_tK: Tensor,
    listed_tK: Tensor,
    inverse_temperature: float,
) -> Tensor:
    (t, H), v = hidden_tH.shape, head_vH.shape[0]
    dz_tv = torch.empty(t, v, dtype=hidden_tH.dtype, device=hidden_tH.device)
    _dlogits[(triton.cdiv(t, BLOCK_T), triton.cdiv(v, BLOCK_V))](
        hidden_tH, head_vH, lse_t, mass_t, dz_tv, t, v, H, inverse_temperature, **_launch(hidden_tH.dtype)
    )
    count, K = places_tK.numel(), places_tK.shape[1]
    _place_labels[(triton.cdiv(count, 1024),)](dz_tv, places_tK, listed_tK, count, v, K, BLOCK=1024)
    return dz_tv


class _Backend(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    dlogits: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


_BACKENDS = {
    "torch": _Backend(_forward_torch, _dlogits_torch),
    "triton": _Backend(_forward_triton, _dlogits_triton),
}
