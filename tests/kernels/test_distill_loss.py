"""The fused losses against autograd over whole logits, both backends, and their promise on memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import distill_loss, distill_tiles, distill_triton, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = ["cross_entropy", "kl", "total_variation"]
# (T, V, H, K): one position; less than one block; ragged blocks of V; of T and H; all of V listed.
SHAPES = [(1, 97, 16, 1), (7, 1000, 64, 5), (3, 2049, 33, 5), (130, 200, 72, 2), (5, 97, 16, 97)]


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def inputs(
    T: int, V: int, H: int, K: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head, and the target's top K: ids and log-probabilities at temperature 0.7."""
    generator = torch.Generator().manual_seed(T + V)
    hidden = torch.randn(T, H, generator=generator).to(DEVICE, dtype)
    head = (2 * torch.randn(V, H, generator=generator) / H**0.5).to(DEVICE, dtype)
    target = 3 * torch.randn(T, V, generator=generator).to(DEVICE)
    top = (target / 0.7).log_softmax(-1).topk(K, dim=-1)
    return hidden, head, top.indices, top.values


def fused(name: str, hidden: Tensor, head: Tensor, ids: Tensor, log_p: Tensor, backend: str) -> Tensor:
    if name == "cross_entropy":
        return distill_loss.cross_entropy(hidden, head, ids[:, 0], backend=backend)
    loss: Callable[..., Tensor] = getattr(distill_loss, name)
    return loss(hidden, head, ids, log_p, 0.7, backend=backend)


def oracle(name: str, hidden: Tensor, head: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    logits = hidden.float() @ head.float().T
    if name == "cross_entropy":
        return reference.cross_entropy(logits, ids[:, 0])
    loss: Callable[..., Tensor] = getattr(reference, name)
    return loss(logits, ids, log_p, 0.7)


def with_gradients(
    loss_of: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = loss_of(hidden, head)
    loss.backward(weight_T)
    assert hidden.grad is not None and head.grad is not None
    assert loss.dtype == torch.float32 and hidden.grad.dtype == hidden.dtype == head.grad.dtype
    return loss.detach(), hidden.grad, head.grad


def both(
    name: str, backend: str, hidden: Tensor, head: Tensor, ids: Tensor, log_p: Tensor, weight_T: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ours, oracle's) loss, gradient of hidden, gradient of head; the oracle's from fp32 copies."""
    ours = with_gradients(lambda x, w: fused(name, x, w, ids, log_p, backend), hidden, head, weight_T)
    theirs = with_gradients(
        lambda x, w: oracle(name, x, w, ids, log_p), hidden.float(), head.float(), weight_T
    )
    return zip(ours, theirs, strict=True)


def weights(T: int) -> Tensor:
    return torch.randn(T, generator=torch.Generator().manual_seed(T)).to(DEVICE)


@pytest.mark.parametrize("tiles", ["one", "many"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_oracles(
    name: str, shape: tuple[int, int, int, int], tiles: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles == "many":
        monkeypatch.setattr(distill_tiles, "SCRATCH_BYTES", 1)
    for ours, theirs in both(name, backend, *inputs(*shape), weights(shape[0])):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_accumulates_in_single(name: str, dtype: torch.dtype, backend: str) -> None:
    """The loss is as exact as in fp32; gradients are off by the roundings of ∂z and of the result."""
    loss, *gradients = both(name, backend, *inputs(7, 1000, 64, 5, dtype), weights(7))
    torch.testing.assert_close(*loss, rtol=1e-4, atol=1e-5)
    for ours, theirs in gradients:
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_labels_at_the_borders_of_blocks(dtype: torch.dtype, backend: str) -> None:
    V = 2 * distill_triton.SPLIT_V + 1
    border = distill_triton.BLOCK_V
    places = [0, border - 1, border, distill_triton.SPLIT_V - 1, distill_triton.SPLIT_V, V - 2, V - 1]
    hidden, head, _, _ = inputs(len(places), V, 24, 1, dtype)
    all_TK = torch.tensor(places, device=DEVICE).expand(len(places), -1)
    log_p = torch.full(all_TK.shape, 0.1, device=DEVICE).log()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-3
    for ids in (all_TK, all_TK[0].unsqueeze(-1)):
        for name in ("cross_entropy", "kl"):
            pairs = both(name, backend, hidden, head, ids, log_p[:, : ids.shape[1]], weights(len(places)))
            for ours, theirs in pairs:
                torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance / 10)


def test_fp16_keeps_the_gradient_of_a_mean_over_many_positions(backend: str) -> None:
    """Most entries of ∂z are 10⁻⁹ here, which fp16 rounds to 0; together they are half of the gradient."""
    hidden, head, ids, log_p = inputs(5, 1000, 32, 1, torch.float16)
    head = head + 30
    weight_T = torch.full((5,), 2.0**-20, device=DEVICE)
    _, (ours, theirs), _ = both("cross_entropy", backend, hidden, head, ids, log_p, weight_T)
    small = 2.0**-24  # the least number that an fp16 result can hold
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=small)


def test_half_precision_keeps_the_gradient_of_a_sure_drafter(backend: str) -> None:
    """q of the label is .999: rounding it before 1 is taken away would leave nothing in bf16."""
    head = torch.eye(50, 64, device=DEVICE, dtype=torch.bfloat16)
    hidden = 11 * head[:8]
    ids = torch.arange(8, device=DEVICE).unsqueeze(-1)
    weight_T = torch.ones(8, device=DEVICE)
    pairs = list(both("cross_entropy", backend, hidden, head, ids, torch.zeros(8, 1), weight_T))
    assert 0 < float(pairs[0][1].amax()) < 2e-3
    for ours, theirs in pairs[1:]:
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=1e-7)


def test_only_the_wanted_gradient_is_made(backend: str) -> None:
    hidden, head, ids, log_p = inputs(3, 97, 16, 2)
    for wanted, other in ((hidden, head), (head, hidden)):
        wanted.requires_grad_(True), other.requires_grad_(False)
        fused("kl", hidden, head, ids, log_p, backend).sum().backward()
        assert wanted.grad is not None and other.grad is None
        wanted.grad = None


def test_views_with_strides_give_the_same(backend: str) -> None:
    hidden, head, ids, log_p = inputs(6, 97, 16, 3)
    x, w, i, p = (tensor.repeat_interleave(2, -1)[:, ::2] for tensor in (hidden, head, ids, log_p))
    assert not x.is_contiguous()
    ours = fused("kl", x, w, i, p, backend)
    assert torch.equal(ours, fused("kl", hidden, head, ids, log_p, backend))


def test_autocast_casts_as_a_linear_layer_does(backend: str) -> None:
    hidden, head, ids, log_p = inputs(5, 97, 16, 3)

    def under_autocast(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return fused("kl", x, w, ids, log_p, backend)

    ours = with_gradients(under_autocast, hidden, head, weights(5))
    cast = with_gradients(
        lambda x, w: fused("kl", x.bfloat16(), w.bfloat16(), ids, log_p, backend), hidden, head, weights(5)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, cast, strict=True))


def test_an_id_outside_the_vocabulary_is_not_a_number(backend: str) -> None:
    hidden, head, _, _ = inputs(3, 97, 16, 1)
    loss = distill_loss.cross_entropy(hidden, head, torch.tensor([97, 96, -1]).to(DEVICE), backend=backend)
    assert loss.isnan().tolist() == [True, False, True]


class PeakMemory(TorchDispatchMode):
    """The most bytes alive at once of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self.known[key] = weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.alive -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_tensor_of_positions_times_vocabulary(
    dtype: torch.dtype, backend: str, largest_allocation: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    T, V, H, scratch = (512, 32768, 8, 2**22) if backend == "torch" else (256, 8192, 32, 2**20)
    K = 4
    monkeypatch.setattr(distill_tiles, "SCRATCH_BYTES", scratch)
    hidden = torch.randn(T, H, device=DEVICE, dtype=dtype).requires_grad_()
    head = torch.randn(V, H, device=DEVICE, dtype=dtype).requires_grad_()
    ids = torch.arange(T * K, device=DEVICE).reshape(T, K) * 13 % V
    log_p = torch.full((T, K), -2.0, device=DEVICE)
    with largest_allocation() as largest, PeakMemory() as memory:
        fused("kl", hidden, head, ids, log_p, backend).mean().backward()
    gradients = (T * H + V * H) * dtype.itemsize + T * H * 4
    copies = V * H * dtype.itemsize if backend == "triton" else 0  # the interpreter copies its arguments
    assert 0 < largest.num_bytes < T * V * dtype.itemsize / 7
    assert scratch / 4 < memory.peak <= scratch + gradients + copies + 32 * T * K * 4 < T * V * 4
    assert torch.isfinite(head.grad).all() and torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("V", [32000, 128256, 151936])
@pytest.mark.parametrize("H", [64, 768, 4096])
@pytest.mark.parametrize("T", [1, 512, 8192, 131072])
def test_tiles_fit_the_scratch_at_every_size(T: int, V: int, H: int) -> None:
    tile_T, tile_V = distill_tiles.tile_shape(T, V, H)
    assert 16 * H * tile_V + tile_T * (8 * H + 12 * tile_V) <= distill_tiles.SCRATCH_BYTES
    assert tile_T * tile_V < 8192 * 32000 / 8
    assert tile_T >= min(T, 512) and tile_V >= 1024  # large enough for a matrix product to be efficient


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 17)}, "must share H"),
        ({"ids": torch.zeros(4, 1, dtype=torch.long)}, "hidden and ids T"),
        ({"ids": torch.zeros(3, 1, dtype=torch.int32)}, "int64"),
        ({"head": torch.zeros(97, 16, dtype=torch.float16)}, "cast both"),
        ({"hidden": torch.zeros(3, 1, 16)}, r"\[T, H\]"),
        ({"hidden": torch.zeros(0, 16), "ids": torch.zeros(0, 1, dtype=torch.long)}, "nothing"),
        ({"temperature": 0.0}, "above 0"),
        ({"backend": "cuda"}, "triton"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str, backend: str) -> None:
    good: dict[str, Any] = {
        "hidden": torch.zeros(3, 16),
        "head": torch.zeros(97, 16),
        "ids": torch.zeros(3, 1, dtype=torch.long),
        "temperature": 1.0,
        "backend": backend,
    }
    given = good | change
    with pytest.raises(ValueError, match=message):
        distill_loss.log_probs(
            given["hidden"], given["head"], given["ids"], given["temperature"], backend=given["backend"]
        )
