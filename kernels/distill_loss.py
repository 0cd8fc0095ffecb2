"""Losses of the drafter from hidden states and head, without logits of all positions. fp32 throughout.

Shape legend: T positions, H hidden width, V vocabulary, K listed tokens of a position.

Every loss here is a small function of the log-probabilities of K listed tokens (the target's arg-max, K = 1,
or its stored top K), so that one operation carries all of them and the rest is ordinary autograd on [T, K]:

    z[t, v] = hidden[t] · head[v] / temperature        L[t] = log Σ_v exp z[t, v]
    log q[t, k] = z[t, ids[t, k]] - L[t]

Gradient, for g = ∂loss/∂log q and c[t] = -Σ_k g[t, k]:

    ∂loss/∂z[t, v] = c[t] · exp(z[t, v] - L[t]) + Σ_k g[t, k] · [v = ids[t, k]]
    ∂loss/∂hidden = ∂z · head / temperature            ∂loss/∂head = ∂zᵀ · hidden / temperature

A backend does two things: `forward` gives L and the listed logits and writes nothing of size T × V;
`dlogits` multiplies again and gives ∂z of one tile of positions × vocabulary.

The backward pass goes through these tiles. ∂z is in the inputs' type, but its listed entries were summed in
fp32: where q is near 1, the difference c·q + g would not survive a half-precision c·q. cuBLAS forms both
products: a purely Triton backward would multiply twice more or add atomically, since a gradient tile as wide
as H does not fit on chip. ∂z is scaled into [-1024, 1024] first, so that fp16 holds a gradient divided by
thousands of positions.

Memory beyond inputs, outputs and [T, K]: at most SCRATCH_BYTES whatever T and V are, and, for half-precision
inputs, an fp32 copy of ∂hidden. Both backends promise it; the backward pass has the same tiles for both.

Liger-Kernel (November 2026) has fused linear cross entropy (`LigerFusedLinearCrossEntropyLoss`), and fused
linear JSD and KL against a teacher's hidden states and head or its full distribution
(`LigerFusedLinearJSD`, `chunked_loss`, `FusedLinearKLDivLoss`). These cut along positions only, so a chunk
spans the whole vocabulary, and compute the gradient in the forward pass for one reduced loss: three matrix
products where four are needed here. None takes stored top-K labels with a bucket for the rest, or gives a
fused linear total variation; and the per-position loss here takes any weights afterwards. Where only cross
entropy is wanted, theirs is the one to beat: the benchmark compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import distill_tiles, distill_triton, reference
from kernels.distill_tiles import add_product, slices, tile_shape

LARGEST_DZ = 1024.0


class _Backend(NamedTuple):
    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    dlogits: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


_BACKENDS = {
    "torch": _Backend(distill_tiles.forward, distill_tiles.dlogits),
    "triton": _Backend(distill_triton.forward, distill_triton.dlogits),
}


def cross_entropy(hidden_TH: Tensor, head_VH: Tensor, argmax_T: Tensor, *, backend: str) -> Tensor:
    """[T] cross entropy against the target's arg-max."""
    return -log_probs(hidden_TH, head_VH, argmax_T.unsqueeze(-1), 1.0, backend=backend).squeeze(-1)


def kl(
    hidden_TH: Tensor,
    head_VH: Tensor,
    ids_TK: Tensor,
    log_p_TK: Tensor,
    temperature: float,
    inside_TK: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """[T] KL(p ‖ q) over the K stored entries and one bucket for the rest, as `reference.kl`."""
    log_q_TK = log_probs(hidden_TH, head_VH, ids_TK, temperature, backend=backend)
    return reference.bucketed_kl(log_q_TK, log_p_TK, inside_TK)


def total_variation(
    hidden_TH: Tensor,
    head_VH: Tensor,
    ids_TK: Tensor,
    log_p_TK: Tensor,
    temperature: float,
    inside_TK: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    """[T] 1 - Σ min(p, q) over the K stored entries and the rest's bucket, as `reference.total_variation`."""
    log_q_TK = log_probs(hidden_TH, head_VH, ids_TK, temperature, backend=backend)
    return reference.bucketed_total_variation(log_q_TK, log_p_TK, inside_TK)


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
    if backend == "triton" and not (hidden_TH.is_cuda or distill_triton.interpreted()):
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
        tile_T, tile_V = tile_shape(T, V, H)
        with torch.autocast(hidden_TH.device.type, enabled=False):
            for columns in slices(V, tile_V):
                head_vH = head_VH[columns]
                sum_vH = torch.zeros_like(head_vH, dtype=torch.float32) if wants_head else None
                for rows in slices(T, tile_T):
                    dz_tv = _BACKENDS[ctx.backend].dlogits(
                        hidden_TH[rows], head_vH, lse_T[rows], mass_T[rows], ids_TK[rows] - columns.start,
                        listed_TK[rows], ctx.inverse_temperature,
                    )  # fmt: skip
                    if grad_hidden is not None:
                        add_product(grad_hidden[rows], dz_tv, head_vH)
                    if sum_vH is not None:
                        add_product(sum_vH, dz_tv.T, hidden_TH[rows])
                    del dz_tv  # before the next tile exists
                if grad_head is not None and sum_vH is not None:
                    grad_head[columns] = sum_vH.mul_(unscale)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(unscale).to(hidden_TH.dtype)
        return grad_hidden, grad_head, None, None, None
