"""Acceptance of a batch of rounds on the device: how many proposals stand, and the token after them.

Shape legend: B rounds, T proposals of the longest round, V vocabulary, S splits of V. T1 is T + 1.

Both functions are pure: the caller brings the uniform numbers, so equal inputs give equal tokens. Nothing is
copied to the host, shapes depend on inputs' shapes alone, and so both can be captured in a CUDA graph. There
is no gradient. Rounds may be ragged: `lengths_B` says how many proposals each has.

Greedy: the accepted are the proposals before the first that differs from the target's arg-max; next comes
that arg-max. One program a round.

Sampling (Leviathan et al.): proposal x at position t stands where u[t] · q[t, x] < p[t, x]. At the first
that does not, the token is drawn from the positive part of p - q, after the last from p. The draw inverts the
cumulative sum: the first v whose sum exceeds u[T] times the total, so neither needs to be normalised. Two
launches: `_accept_and_sum` with a program per round and part of V, so that one round spreads over many
multiprocessors, each finding the acceptance again (T gathers) and summing its part of what is drawn from;
then `_draw`, one program a round, finds the part and within it the token. Whatever T is, one row of p and of
q is read, and one part of it again. fp32 sums, whatever the inputs' type.

The positive part of p - q can only sum to 0 by rounding. A rejected x has q(x) > p(x); both rows sum to 1, so
what q has more there, p has more elsewhere. In floating point the rows' sums differ by some 1e-7, and where
p and q agree to that, nothing may be left: then the draw is from p, which is as close as rounding allows.

Temperature is the caller's: p and q are probabilities after it, and for q exactly those that the proposals
were drawn from. Memory: 8 bytes a round and 4096 vocabulary entries.

Oracles: `reference.greedy_accept`, `reference.rejection_accept`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_V = 4096


def greedy_accept(
    draft_BT: Tensor, target_BT1: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Accepted proposals [B] of each round and the target's token after them [B], both int64.

    Args:
        draft_BT: [B, T] int64, the proposals; entries at or behind a round's length are not read.
        target_BT1: [B, T + 1] int64, the target's arg-max before each proposal and after the last.
        lengths_B: [B] int64 between 0 and T, the proposals of each round; all T if None.

    Raises:
        ValueError: if shapes or types do not fit together.
    """
    lengths_B = _lengths(draft_BT, lengths_B)
    _expect("target", target_BT1, (draft_BT.shape[0], draft_BT.shape[1] + 1), torch.int64)
    accepted_B, next_B = torch.empty_like(lengths_B), torch.empty_like(lengths_B)
    (B, T), block_T = draft_BT.shape, triton.next_power_of_2(max(draft_BT.shape[1], 1))
    _greedy[(B,)](
        draft_BT.contiguous(), target_BT1.contiguous(), lengths_B, accepted_B, next_B, T, BLOCK_T=block_T
    )
    return accepted_B, next_B


def rejection_accept(
    draft_BT: Tensor, q_BTV: Tensor, p_BT1V: Tensor, uniforms_BT1: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Accepted proposals [B] of each round and the token drawn after them [B], both int64.

    Args:
        draft_BT: [B, T] int64, proposals drawn from `q_BTV`; none is read behind its round's length.
        q_BTV: [B, T, V] the drafter's probabilities, in any floating-point type.
        p_BT1V: [B, T + 1, V] the target's probabilities.
        uniforms_BT1: [B, T + 1] fp32 in [0, 1): one a proposal; the last draws the next token.
        lengths_B: [B] int64 between 0 and T, the proposals of each round; all T if None.

    Tensors that are not contiguous are copied first.

    Returns:
        The next token is -1 where the row that it is drawn from has no positive entry or holds NaN.

    Raises:
        ValueError: if shapes or types do not fit together.
    """
    lengths_B = _lengths(draft_BT, lengths_B)
    (B, T), V = draft_BT.shape, p_BT1V.shape[-1]
    _expect("q", q_BTV, (B, T, V))
    _expect("p", p_BT1V, (B, T + 1, V))
    _expect("uniforms", uniforms_BT1, (B, T + 1), torch.float32)
    draft_BT, q_BTV, p_BT1V = draft_BT.contiguous(), q_BTV.contiguous(), p_BT1V.contiguous()
    uniforms_BT1 = uniforms_BT1.contiguous()
    accepted_B, next_B = torch.empty_like(lengths_B), torch.empty_like(lengths_B)
    num_splits = triton.cdiv(V, SPLIT_V)
    sums_B2S = torch.empty(B, 2, num_splits, dtype=torch.float32, device=draft_BT.device)
    _accept_and_sum[(B, num_splits)](
        draft_BT, q_BTV, p_BT1V, uniforms_BT1, lengths_B, accepted_B, sums_B2S, T, V,
        BLOCK_T=triton.next_power_of_2(max(T, 1)), SPLIT_V=SPLIT_V, num_warps=8,
    )  # fmt: skip
    _draw[(B,)](
        q_BTV, p_BT1V, uniforms_BT1, lengths_B, accepted_B, sums_B2S, next_B, T, V, num_splits,
        BLOCK_S=triton.next_power_of_2(num_splits), SPLIT_V=SPLIT_V, num_warps=8,
    )  # fmt: skip
    return accepted_B, next_B


def _lengths(draft_BT: Tensor, lengths_B: Tensor | None) -> Tensor:
    if draft_BT.dim() != 2 or draft_BT.dtype != torch.int64:
        raise ValueError(f"draft must be [B, T] int64, not {list(draft_BT.shape)} {draft_BT.dtype}")
    if not (draft_BT.is_cuda or triton.knobs.runtime.interpret):
        raise ValueError(f"this kernel needs a GPU, and draft is on {draft_BT.device}: use kernels.reference")
    B, T = draft_BT.shape
    if lengths_B is None:
        return torch.full((B,), T, dtype=torch.int64, device=draft_BT.device)
    _expect("lengths", lengths_B, (B,), torch.int64)
    return lengths_B.contiguous()


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} to fit draft, not {list(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if dtype is None and not tensor.is_floating_point():
        raise ValueError(f"{name} must be probabilities in a floating-point type, not {tensor.dtype}")


@triton.jit
def _greedy(  # type: ignore[no-untyped-def]
    draft, target, lengths, accepted, following, T, BLOCK_T: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    length = tl.load(lengths + row)
    inside = t < length
    proposal = tl.load(draft + row * T + t, mask=inside, other=-1)
    choice = tl.load(target + row * (T + 1) + t, mask=inside, other=-1)
    count = tl.min(tl.where(inside & (proposal != choice), t.to(tl.int64), length), 0)
    tl.store(accepted + row, count)
    tl.store(following + row, tl.load(target + row * (T + 1) + count))


@triton.jit
def _to_draw_from(q, p, row, count, length, v, T, V):
    """Row `count` of p, and its positive part over q: p itself where no proposal was rejected."""
    inside = (v >= 0) & (v < V)
    p_v = tl.load(p + (row * (T + 1) + count) * V + v, mask=inside, other=0.0).to(tl.float32)
    inside_q = (v >= 0) & (v < tl.where(count < length, V, 0))
    q_v = tl.load(q + (row * T + count) * V + v, mask=inside_q, other=0.0).to(tl.float32)
    difference = p_v - q_v
    # Not maximum(…, 0), which may drop NaN.
    return p_v, tl.where(difference < 0, 0.0, difference)


@triton.jit
def _accept_and_sum(  # type: ignore[no-untyped-def]
    draft, q, p, uniforms, lengths, accepted, sums, T, V, BLOCK_T: tl.constexpr, SPLIT_V: tl.constexpr
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    length = tl.load(lengths + row)
    inside_t = t < length
    proposal = tl.load(draft + row * T + t, mask=inside_t, other=0)
    u = tl.load(uniforms + row * (T + 1) + t, mask=inside_t, other=0.0)
    p_t = tl.load(p + (row * (T + 1) + t) * V + proposal, mask=inside_t, other=0.0).to(tl.float32)
    q_t = tl.load(q + (row * T + t) * V + proposal, mask=inside_t, other=0.0).to(tl.float32)
    stands = u * q_t < p_t
    count = tl.min(tl.where(inside_t & (stands == 0), t, length), 0)

    v = split * SPLIT_V + tl.arange(0, SPLIT_V)
    p_v, rest_v = _to_draw_from(q, p, row, count, length, v, T, V)
    num_splits = tl.num_programs(1)
    tl.store(sums + row * 2 * num_splits + split, tl.sum(rest_v, 0))
    tl.store(sums + (row * 2 + 1) * num_splits + split, tl.sum(p_v, 0))
    tl.store(accepted + row, count, mask=split == 0)


@triton.jit
def _first_above(values, threshold, index):
    """The first index whose cumulative sum exceeds the threshold; -1 if no value is positive.

    Only positive values qualify: a parallel sum may differ by a rounding between neighbours of which one is
    0. Where rounding keeps the whole sum at or under the threshold, it is the last positive one.
    """
    above = (values > 0) & (tl.cumsum(values, 0) > threshold)
    first = tl.min(tl.where(above, index, 2147483647), 0)
    last = tl.max(tl.where(values > 0, index, -1), 0)
    return tl.minimum(first, last)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    q, p, uniforms, lengths, accepted, sums, following, T, V, num_splits,
    BLOCK_S: tl.constexpr, SPLIT_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count, length = tl.load(accepted + row), tl.load(lengths + row)
    s = tl.arange(0, BLOCK_S)
    rest_s = tl.load(sums + row * 2 * num_splits + s, mask=s < num_splits, other=0.0)
    p_s = tl.load(sums + (row * 2 + 1) * num_splits + s, mask=s < num_splits, other=0.0)
    from_p = tl.sum(rest_s, 0) == 0
    sum_s = tl.where(from_p, p_s, rest_s)
    total = tl.sum(sum_s, 0)
    threshold = tl.load(uniforms + row * (T + 1) + T) * total
    chosen = _first_above(sum_s, threshold, s)
    before = tl.sum(tl.where(s < chosen, sum_s, 0.0), 0)

    v = chosen * SPLIT_V + tl.arange(0, SPLIT_V)
    p_v, rest_v = _to_draw_from(q, p, row, count, length, v, T, V)
    token = _first_above(tl.where(from_p, p_v, rest_v), threshold - before, v)
    # A comparison with NaN is false.
    tl.store(following + row, tl.where(total > 0, token, -1).to(tl.int64))
