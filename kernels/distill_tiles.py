"""The tiles of positions × vocabulary that `distill_loss.py` goes through, and its torch backend.

Whatever T and V are, the temporaries of a tile fit in SCRATCH_BYTES. Shapes are those of `distill_loss.py`;
t and v are the positions and vocabulary entries of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCRATCH_BYTES = 256 * 2**20


def tile_shape(T: int, V: int, H: int) -> tuple[int, int]:
    """Positions and vocabulary entries of a tile, such that all its temporaries fit in SCRATCH_BYTES.

    Half of the bytes is for up to four fp32 rows of width H per vocabulary entry. Half is for two such rows
    per position and, per position and vocabulary entry, up to three values: ∂z or the logit, its copy in the
    inputs' type, and the transposed cast of that copy.
    """
    tile_V = min(V, 16384, max(128, SCRATCH_BYTES // (32 * H) // 128 * 128))
    tile_T = min(T, max(16, SCRATCH_BYTES // (16 * H + 24 * tile_V) // 16 * 16))
    return tile_T, tile_V


def slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in place, accumulated in fp32."""
    if left.is_cuda and left.dtype != torch.float32:
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.float(), right.float())


def _logits(hidden_tH: Tensor, head_vH: Tensor, inverse_temperature: float) -> Tensor:
    z_tv = hidden_tH.new_zeros((len(hidden_tH), len(head_vH)), dtype=torch.float32)
    add_product(z_tv, hidden_tH, head_vH.T)
    return z_tv.mul_(inverse_temperature)


def _within(places_tK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which listed tokens lie in a tile of `width` columns, and a column that exists for each."""
    return (places_tK >= 0) & (places_tK < width), places_tK.clamp(0, width - 1)


def forward(
    hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor]:
    """[T] log Σ exp z, and the listed logits [T, K]: NaN for an id outside 0..V-1."""
    (T, H), V = hidden_TH.shape, head_VH.shape[0]
    lse_T = hidden_TH.new_full((T,), -torch.inf, dtype=torch.float32)
    listed_TK = torch.full_like(ids_TK, torch.nan, dtype=torch.float32)
    tile_T, tile_V = tile_shape(T, V, H)
    for columns in slices(V, tile_V):
        for rows in slices(T, tile_T):
            z_tv = _logits(hidden_TH[rows], head_VH[columns], inverse_temperature)
            inside_tK, place_tK = _within(ids_TK[rows] - columns.start, z_tv.shape[1])
            listed_TK[rows] = torch.where(inside_tK, z_tv.gather(1, place_tK), listed_TK[rows])
            largest_t = z_tv.amax(1)
            sum_t = z_tv.sub_(largest_t.unsqueeze(-1)).exp_().sum(1)
            lse_T[rows] = torch.logaddexp(lse_T[rows], largest_t + sum_t.log())
            del z_tv  # before the next tile exists
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
    """∂z [t, v] of a tile: mass · exp(z - L), and `listed` where a listed token's place is in the tile."""
    dz_tv = _logits(hidden_tH, head_vH, inverse_temperature)
    dz_tv.sub_(lse_t.unsqueeze(-1)).exp_().mul_(mass_t.unsqueeze(-1))
    inside_tK, place_tK = _within(places_tK, dz_tv.shape[1])
    change_tK = torch.where(inside_tK, listed_tK - dz_tv.gather(1, place_tK), 0.0)
    return dz_tv.scatter_add_(1, place_tK, change_tK).to(hidden_tH.dtype)
