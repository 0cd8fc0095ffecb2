"""Every Triton kernel against its oracle: odd and real shapes, three types, forward and gradient.

Fresh memory holds NaN, and so do buffers beyond what a kernel may read, so that a wrong read or a forgotten
write is seen. `tests/kernels` says more of each; this is what a machine without pytest can run in a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rows import Row, row
from kernels import accept, chunk_attention, chunk_select, distill_loss, reference, verify_attention

TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of an attention's output, which is rounded to its type once.
ROUNDING = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EXACT = 1e-4  # of what is summed in fp32


@dataclass(frozen=True)
class Shapes:
    """What the kernels are tried on.

    Attributes:
        attention: (B, H, G, Q, length, D): prompts, KV heads, query heads of each, queries, entries, width.
        selection: (B, H, S, D, budget).
        losses: (T, V, H, K): positions, vocabulary, hidden width, listed tokens.
        rounds: (B, T, V): rounds, proposals, vocabulary.
    """

    attention: tuple[tuple[int, ...], ...]
    selection: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[int, ...], ...]
    rounds: tuple[tuple[int, ...], ...]


ODD = Shapes(
    attention=((1, 2, 1, 1, 37, 16), (1, 2, 4, 5, 77, 20), (2, 1, 3, 7, 129, 128), (1, 1, 4, 17, 17, 8)),
    selection=((1, 1, 129, 64, 16), (2, 3, 203, 16, 64), (2, 1, 96, 12, 48), (3, 1, 23, 4, 16)),
    losses=((1, 97, 16, 1), (7, 1000, 64, 5), (3, 2049, 33, 5), (130, 200, 72, 2)),
    rounds=((10, 1, 5), (10, 7, 97), (10, 7, 2049)),
)
REAL = Shapes(
    attention=((1, 32, 1, 1, 16_384, 128), (1, 8, 4, 17, 16_381, 128), (4, 3, 3, 5, 8_000, 64)),
    selection=((1, 32, 16_384, 128, 1024), (2, 8, 16_381, 128, 256)),
    losses=((1000, 49_152, 576, 32), (257, 131_072, 768, 32)),
    rounds=((16, 16, 32_000), (4, 50, 49_152)),
)


@contextmanager
def poisoned() -> Iterator[None]:
    """What torch allocates holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_rows(shapes: Shapes, device: str) -> Iterator[Row]:
    """A row for each kernel and type: the worst error over its tolerance; 1 and less is right."""
    for dtype in TYPES:
        yield worst(f"verify_attention, {name_of(dtype)}", attention, shapes.attention, dtype, device)
        yield worst(f"chunk_attention, {name_of(dtype)}", shares, shapes.attention, dtype, device)
        yield worst(f"chunk_select, {name_of(dtype)}", selection, shapes.selection, dtype, device)
        for loss in ("cross_entropy", "kl", "total_variation"):
            checked = f"{loss} and its gradients, {name_of(dtype)}"

            def check(shape: Sequence[int], dtype: torch.dtype, device: str, loss: str = loss) -> float:
                return losses(loss, shape, dtype, device)

            yield worst(checked, check, shapes.losses, dtype, device)
        yield worst(f"accept, {name_of(dtype)}", rounds, shapes.rounds, dtype, device)


def worst(
    name: str,
    check: Callable[[Sequence[int], torch.dtype, str], float],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: str,
) -> Row:
    with poisoned():
        errors = {str(tuple(shape)): check(shape, dtype, device) for shape in shapes}
    at, error = max(errors.items(), key=lambda item: item[1])
    note = f"{len(errors)} shapes; worst at {at}"
    return row(f"GPU {name}: worst error ÷ tolerance", [error], 1.0, at_most=True, unit="", note=note)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def error_of(ours: Tensor, exact: Tensor, tolerance: float) -> float:
    """The worst |ours − exact| over tolerance · (1 + |exact|); infinite where one is NaN."""
    errors = (ours.double() - exact.double()).abs() / (tolerance * (1 + exact.double().abs()))
    return float(errors.nan_to_num(nan=torch.inf).max())


def distance(ours: Tensor, exact: Tensor, tolerance: float) -> float:
    """‖ours − exact‖ ÷ ‖exact‖, over a tolerance."""
    error = (ours.double() - exact.double()).norm() / exact.double().norm()
    return float(error.nan_to_num(nan=torch.inf)) / tolerance


def random(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def attention(shape: Sequence[int], dtype: torch.dtype, device: str) -> float:
    """Over all that is stored, and through a window."""
    B, H, G, Q, length, D = shape
    query = random(B, H * G, Q, D, dtype=dtype, device=device)
    stored = random(2, B, H, length + 23, D, dtype=dtype, device=device)
    stored[:, :, :, length:] = torch.nan
    key, value = stored
    errors = []
    for window in (None, (4, length // 2)):
        ours = verify_attention.verify_attention(query, key, value, D**-0.5, length, window=window)
        whole = (query.float(), key.float(), value.float(), D**-0.5, length, window)
        errors.append(error_of(ours, reference.verify_attention(*whole), ROUNDING[dtype]))
    return max(errors)


def shares(shape: Sequence[int], dtype: torch.dtype, device: str) -> float:
    B, H, G, Q, length, D = shape
    queries = random(B, H, G, Q, D, dtype=dtype, device=device)
    keys = random(B, H, length, D, dtype=dtype, device=device)
    ours = chunk_attention.chunk_attention(queries, keys, D**-0.5)
    exact = reference.chunk_attention(queries.float(), keys.float(), D**-0.5)
    return error_of(ours, exact, ROUNDING[dtype])


def selection(shape: Sequence[int], dtype: torch.dtype, device: str) -> float:
    """Up to ties within the rounding of a sum, the oracle's entries; what is copied is what they hold."""
    B, H, S, D, budget = shape
    keys, values = random(2, B, H, S, D, dtype=dtype, device=device)
    kept_keys, kept_values, indices = chunk_select.chunk_select(keys, values, budget)
    _, _, exact = reference.chunk_select(keys, values, budget)
    at = indices.unsqueeze(-1).expand(-1, -1, -1, D)
    copied = torch.equal(kept_keys, keys.gather(2, at)) and torch.equal(kept_values, values.gather(2, at))
    different = float((indices != exact).float().mean()) if copied else torch.inf
    return different / 0.01


def losses(loss: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> float:
    """The loss within fp32's rounding, the gradients within that of their type."""
    T, V, H, K = shape
    hidden = random(T, H, dtype=dtype, device=device)
    head = (2 * random(V, H, dtype=torch.float32, device=device) / H**0.5).to(dtype)
    top = (3 * random(T, V, dtype=torch.float32, device=device) / 0.7).log_softmax(-1).topk(K, dim=-1)
    weight_T = random(T, dtype=torch.float32, device=device)

    def with_gradients(of: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> tuple[Tensor, ...]:
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        values_T = of(*inputs)
        return values_T.detach(), *torch.autograd.grad(values_T, inputs, weight_T)

    def fused(hidden: Tensor, head: Tensor) -> Tensor:
        if loss == "cross_entropy":
            return distill_loss.cross_entropy(hidden, head, top.indices[:, 0], backend="triton")
        made: Tensor = getattr(distill_loss, loss)(
            hidden, head, top.indices, top.values, 0.7, backend="triton"
        )
        return made

    def whole(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ head.T
        if loss == "cross_entropy":
            return reference.cross_entropy(logits, top.indices[:, 0])
        made: Tensor = getattr(reference, loss)(logits, top.indices, top.values, 0.7)
        return made

    value, *gradients = with_gradients(fused, hidden, head)
    exact, *exact_gradients = with_gradients(whole, hidden.float(), head.float())
    rounding = max(EXACT, 2 * torch.finfo(dtype).eps)
    pairs = zip(gradients, exact_gradients, strict=True)
    return max(error_of(value, exact, EXACT), *(distance(a, b, rounding) for a, b in pairs))


def rounds(shape: Sequence[int], dtype: torch.dtype, device: str) -> float:
    """Greedy acceptance exactly; sampled rounds up to one in twenty, where a sum's rounding decides."""
    B, T, V = shape
    q = random(B, T, V, dtype=torch.float32, device=device).softmax(-1)
    p = ((q + random(B, T, V, dtype=torch.float32, device=device).softmax(-1)) / 2).to(dtype)
    p = torch.cat([p, p[:, :1]], 1)
    generator = torch.Generator(device).manual_seed(0)
    draft = torch.multinomial(q.flatten(0, 1), 1, generator=generator).reshape(B, T)
    uniforms = torch.rand(B, T + 1, generator=generator, device=device)
    lengths = torch.arange(B, device=device).remainder(T + 1)
    best = torch.where(torch.rand(B, T + 1, generator=generator, device=device) < 0.8, p.argmax(-1), 0)
    greedy = (draft, best, lengths)
    same = all(map(torch.equal, accept.greedy_accept(*greedy), reference.greedy_accept(*greedy)))
    sampled = (draft, q.to(dtype), p, uniforms, lengths)
    ours, exact = accept.rejection_accept(*sampled), reference.rejection_accept(*sampled)
    different = max(float((a != b).float().mean()) for a, b in zip(ours, exact, strict=True))
    return different / 0.05 if same else torch.inf
