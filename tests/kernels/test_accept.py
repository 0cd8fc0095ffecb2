"""Acceptance on the device against the round-by-round oracle, and against what sampling promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import accept, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Accept = Callable[..., tuple[Tensor, Tensor]]
BOTH = pytest.mark.parametrize(
    "rejection_accept", [accept.rejection_accept, reference.rejection_accept], ids=["triton", "oracle"]
)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def distributions(rows: int, V: int, seed: int, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def rounds(
    B: int, T: int, V: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """draft, q, p, uniforms: proposals drawn from q, and a p that accepts about half of them."""
    generator = torch.Generator().manual_seed(seed)
    q = distributions(B * T, V, seed).reshape(B, T, V)
    noise = distributions(B * T, V, seed + 1).reshape(B, T, V)
    p = torch.cat([(q + noise) / 2, distributions(B, V, seed + 2).unsqueeze(1)], 1)
    q, p = q.to(dtype), p.to(dtype)
    draft = torch.multinomial(q.float().flatten(0, 1), 1, generator=generator).reshape(B, T)
    uniforms = torch.rand(B, T + 1, generator=generator)
    return draft.to(DEVICE), q.to(DEVICE), p.to(DEVICE), uniforms.to(DEVICE)


def round_by_round(
    draft: Tensor, q: Tensor, p: Tensor, uniforms: Tensor, lengths: Tensor | None = None
) -> tuple[list[int], list[int]]:
    """Rejection sampling as the paper tells it, one round and one number at a time, in double precision."""
    accepted, following = [], []
    for row, T in enumerate([draft.shape[1]] * len(draft) if lengths is None else lengths.tolist()):
        count = 0
        while count < T:
            token = int(draft[row, count])
            if not float(uniforms[row, count]) * float(q[row, count, token]) < float(p[row, count, token]):
                break
            count += 1
        weights = [float(x) for x in p[row, count]]
        if count < T:
            rest = [max(0.0, a - float(b)) for a, b in zip(weights, q[row, count], strict=True)]
            weights = rest if sum(rest) > 0 else weights
        threshold, sums = float(uniforms[row, -1]) * sum(weights), list(itertools.accumulate(weights))
        accepted.append(count)
        following.append(next(v for v, w in enumerate(weights) if w and sums[v] > threshold))
    return accepted, following


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("T", "V"), [(1, 5), (4, 97), (7, 1000)])
def test_the_oracle_is_the_paper_round_by_round(T: int, V: int, ragged: bool) -> None:
    given = [tensor.cpu() for tensor in rounds(40, T, V, torch.float32, seed=T)]
    lengths = torch.arange(40).remainder(T + 1) if ragged else None
    accepted, following = reference.rejection_accept(*given, lengths_B=lengths)
    assert (accepted.tolist(), following.tolist()) == round_by_round(*given, lengths)
    target = given[2].argmax(-1)
    accepted, following = reference.greedy_accept(given[0], target, lengths)
    for row, (count, token) in enumerate(zip(accepted.tolist(), following.tolist(), strict=True)):
        length = T if lengths is None else int(lengths[row])
        same = [int(a) == int(b) for a, b in zip(given[0][row, :length], target[row], strict=False)]
        assert count == (same.index(False) if False in same else length)
        assert token == int(target[row, count])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("T", [1, 5, 7, 33])
def test_greedy_is_the_oracle(T: int, ragged: bool) -> None:
    B, generator = 12, torch.Generator().manual_seed(T)
    target = torch.randint(3, (B, T + 1), generator=generator)
    draft = torch.where(torch.rand(B, T, generator=generator) < 0.8, target[:, :-1], 9)
    draft[0], target[1, 0], draft[1, 0] = target[0, :-1], 4, 5  # all and none accepted
    lengths = torch.arange(B).remainder(T + 1) if ragged else None
    given = [None if tensor is None else tensor.to(DEVICE) for tensor in (draft, target, lengths)]
    ours = accept.greedy_accept(*given)  # type: ignore[arg-type]
    for kernel, oracle in zip(ours, reference.greedy_accept(*given), strict=True):  # type: ignore[arg-type]
        assert torch.equal(kernel, oracle) and kernel.dtype == torch.int64


def test_greedy_does_not_read_behind_a_rounds_length() -> None:
    draft = torch.tensor([[7, 8, 9], [7, 8, 9]], device=DEVICE)
    target = torch.tensor([[7, 8, 9, 4], [7, 8, 9, 4]], device=DEVICE)
    accepted, following = accept.greedy_accept(draft, target, torch.tensor([1, 0], device=DEVICE))
    assert accepted.tolist() == [1, 0] and following.tolist() == [8, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("V", [5, 97, 1000, 2049, 2 * accept.SPLIT_V, 2 * accept.SPLIT_V + 1])
@pytest.mark.parametrize("T", [1, 7])
def test_sampling_is_the_oracle(T: int, V: int, ragged: bool, dtype: torch.dtype) -> None:
    B = 10
    given = rounds(B, T, V, dtype, seed=V + T)
    lengths = torch.arange(B, device=DEVICE).remainder(T + 1) if ragged else None
    ours = accept.rejection_accept(*given, lengths_B=lengths)
    theirs = reference.rejection_accept(*given, lengths_B=lengths)
    for kernel, oracle in zip(ours, theirs, strict=True):
        assert torch.equal(kernel, oracle) and kernel.dtype == torch.int64
    assert len(set(ours[0].tolist())) > 1


def test_the_draw_goes_through_every_part_of_the_vocabulary() -> None:
    """p is spread evenly, so the uniform number is the token's place; both ends of parts included."""
    V, B = 3 * accept.SPLIT_V, 9
    places = torch.tensor([0, 1, 4095, 4096, 4097, 8191, 8192, 12286, 12287])
    p = torch.full((B, 1, V), 1.0 / V, device=DEVICE)
    uniforms = ((places + 0.5) / V).unsqueeze(1).to(DEVICE)
    draft, q = torch.zeros(B, 0, dtype=torch.long, device=DEVICE), torch.zeros(B, 0, V, device=DEVICE)
    accepted, following = accept.rejection_accept(draft, q, p, uniforms)
    assert accepted.tolist() == [0] * B and following.tolist() == places.tolist()


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
@BOTH
def test_the_extreme_uniform_numbers_draw_possible_tokens(rejection_accept: Accept, u: float) -> None:
    """Rounding must neither reach behind the last positive entry nor stop before the first."""
    V = accept.SPLIT_V + 300
    p = torch.zeros(4, 1, V)
    for row, (first, last) in enumerate([(17, V - 40), (0, 90), (accept.SPLIT_V + 3, V - 1), (55, 55)]):
        p[row, 0, first : last + 1] = distributions(1, last - first + 1, row)
        p[row, 0, [first, last]] = 0.01
    p /= p.sum(-1, keepdim=True)
    draft, q = torch.zeros(4, 0, dtype=torch.long, device=DEVICE), torch.zeros(4, 0, V, device=DEVICE)
    _, following = rejection_accept(draft, q, p.to(DEVICE), torch.full((4, 1), u, device=DEVICE))
    expected = [17, 0, accept.SPLIT_V + 3, 55] if u == 0 else [V - 40, 90, V - 1, 55]
    assert following.tolist() == expected


@triton.jit
def _first_above(values, threshold, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, N)
    tl.store(out, accept._first_above(tl.load(values + index), tl.load(threshold), index))


def test_a_search_that_rounding_leads_astray_ends_at_a_positive_entry() -> None:
    """What is left of the threshold in the chosen part may be a little under 0, or over the part's sum."""
    values = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0, 0.0, 0.0], device=DEVICE)
    found = torch.empty(1, dtype=torch.int32, device=DEVICE)
    for threshold, place in ((-1e-7, 1), (0.0, 1), (0.5, 3), (0.75, 4), (1.0 + 1e-6, 4)):
        _first_above[(1,)](values, torch.tensor([threshold], device=DEVICE), found, N=8)
        assert int(found) == place
    _first_above[(1,)](torch.zeros_like(values), torch.zeros(1, device=DEVICE), found, N=8)
    assert int(found) == -1


@pytest.mark.parametrize(
    ("rejection_accept", "B"),
    [
        pytest.param(accept.rejection_accept, 400 if DEVICE == "cpu" else 20000, id="triton"),
        pytest.param(reference.rejection_accept, 4000, id="oracle"),
    ],
)
def test_emitted_tokens_are_distributed_as_the_target(
    rejection_accept: Accept, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each emitted token, accepted or drawn, is within 4 sigma of p among the rounds that came to it."""
    V = 7
    monkeypatch.setattr(accept, "SPLIT_V", 4)
    q, p = distributions(2, V, 3, 1.0), distributions(3, V, 4, 1.0)
    generator = torch.Generator().manual_seed(0)
    draft = torch.stack([torch.multinomial(row, B, True, generator=generator) for row in q], 1)
    accepted, following = rejection_accept(
        draft.to(DEVICE),
        q.expand(B, -1, -1).to(DEVICE),
        p.expand(B, -1, -1).to(DEVICE),
        torch.rand(B, 3, generator=generator).to(DEVICE),
    )
    accepted, following = accepted.cpu(), following.cpu()
    for t in range(3):
        reached = accepted >= t
        proposal = draft[:, t] if t < 2 else following
        tokens = torch.where(accepted > t, proposal, following)[reached]
        shares = torch.bincount(tokens, minlength=V) / len(tokens)
        deviation = (p[t] * (1 - p[t]) / len(tokens)).sqrt()
        assert ((shares - p[t]).abs() < 4 * deviation).all(), t
    assert 0.1 < (accepted == 0).double().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_distributions_always_accept(dtype: torch.dtype) -> None:
    """Also at the largest number below 1, where a rounded product could reach p."""
    draft, q, p, uniforms = rounds(20, 7, 97, dtype)
    p[:, :-1] = q
    uniforms[:10, :-1] = 1 - 2.0**-24
    accepted, following = accept.rejection_accept(draft, q, p, uniforms)
    assert (accepted == 7).all()
    assert torch.equal(following, reference.rejection_accept(draft, q, p, uniforms)[1])


def test_disjoint_distributions_always_reject_and_draw_from_the_target() -> None:
    V, B = 40, 50
    q, p = torch.zeros(B, 3, V), torch.zeros(B, 4, V)
    q[..., :20], p[..., 20:] = distributions(1, 20, 1), distributions(1, 20, 2)
    draft = torch.multinomial(q.flatten(0, 1), 1).reshape(B, 3)
    uniforms = torch.rand(B, 4, generator=torch.Generator().manual_seed(1))
    given = [tensor.to(DEVICE) for tensor in (draft, q, p, uniforms)]
    given[3][:3, :-1] = 0.0  # 0 · q < 0 is false: even then
    accepted, following = accept.rejection_accept(*given)
    assert (accepted == 0).all() and (following >= 20).all()
    assert torch.equal(following, reference.rejection_accept(*given)[1])


@BOTH
def test_a_residual_of_nothing_draws_from_the_target(rejection_accept: Accept) -> None:
    """Rows that differ by rounding alone: q is above p where it was rejected, and p above q nowhere."""
    p = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]], device=DEVICE)
    q = p[:, :1].clone()
    q[0, 0, 0] = 0.25 + 2.0**-20
    draft = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    for u, token in ((0.2, 0), (0.3, 1)):
        uniforms = torch.tensor([[1 - 2.0**-24, u]], device=DEVICE)
        accepted, following = rejection_accept(draft, q, p, uniforms)
        assert accepted.tolist() == [0] and following.tolist() == [token]


def test_nothing_behind_a_rounds_length_is_read() -> None:
    draft, q, p, uniforms = rounds(8, 5, 97, torch.float32)
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 0, 2], device=DEVICE)
    clean = accept.rejection_accept(draft, q, p, uniforms, lengths)
    for row, length in enumerate(lengths.tolist()):
        draft[row, length:] = 2**40
        q[row, length:], p[row, length + 1 :], uniforms[row, length:-1] = torch.nan, torch.nan, torch.nan
    poisoned = accept.rejection_accept(draft, q, p, uniforms, lengths)
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1], poisoned[1])


@pytest.mark.parametrize("V", [97, accept.SPLIT_V + 1])
def test_a_row_that_is_not_a_distribution_gives_no_token(V: int) -> None:
    draft, q, p, uniforms = rounds(4, 2, V, torch.float32)
    p[0, :, 3], q[1, :, 4], p[2] = torch.nan, torch.nan, 0.0
    uniforms[1, 0] = 1 - 2.0**-24
    q[1, 0, draft[1, 0]] = 1.0
    _, following = accept.rejection_accept(draft, q, p, uniforms)
    assert following[:3].tolist() == [-1, -1, -1] and following[3] >= 0


def test_what_does_not_fit_is_named() -> None:
    draft, q, p, uniforms = rounds(2, 3, 11, torch.float32)
    wrong: list[tuple[str, tuple[Tensor, ...]]] = [
        ("draft must be", (draft.int(), q, p, uniforms)),
        ("q must have shape", (draft, q[:, :2], p, uniforms)),
        ("q must be probabilities", (draft, q.long(), p, uniforms)),
        ("p must have shape", (draft, q, p[:, :3], uniforms)),
        ("uniforms must have shape", (draft, q, p, uniforms[:, :3])),
        ("uniforms must be", (draft, q, p, uniforms.double())),
        ("lengths must have shape", (draft, q, p, uniforms, torch.zeros(3, dtype=torch.long))),
        ("lengths must be", (draft, q, p, uniforms, torch.zeros(2))),
    ]
    for message, given in wrong:
        with pytest.raises(ValueError, match=message):
            accept.rejection_accept(*given)
    with pytest.raises(ValueError, match="target must have shape"):
        accept.greedy_accept(draft, draft)
