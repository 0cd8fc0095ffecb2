"""Each Triton kernel against eager torch, compiled torch and the library's: time, peak memory, bandwidth.

Liger-Kernel's fused cross entropy is compared where it is installed. `Sizes` may be small and on a CPU, so
that the whole file runs in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.rows import Row, interleaved, ratios, row, seconds_of
from kernels import accept, chunk_select, distill_loss, reference, verify_attention
from pipeline.hardware import gpu_name


@dataclass(frozen=True)
class Sizes:
    """What is timed and where: a layer of Llama-2-7B at 16K, a drafter's loss over 128K tokens."""

    device: str = "cuda"
    tokens: int = 16_384
    heads: int = 32
    width: int = 128
    budget: int = 1024
    positions: int = 8192
    hidden: int = 768
    vocabulary: int = 131_072
    rounds: tuple[int, int, int] = (8, 16, 32_000)  # rounds, proposals, vocabulary
    copied: int = 2**30  # numbers of the copy that bandwidth is measured by
    repeats: int = 20
    compiled: bool = True  # whether compiled torch and flex attention are compared too

    @property
    def name(self) -> str:
        return gpu_name() if self.device == "cuda" else self.device


Timer = Callable[[Callable[[int], object], str], Callable[[], float]]


def captured(function: Callable[[int], object], device: str, calls: int = 10) -> Callable[[], float]:
    """Seconds of one call by the device's clock, in a CUDA graph of several calls: launching costs nothing.

    `function` is given the call's number, so that each call can read other memory than the one before.
    """
    if device != "cuda":
        return plain(function, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number in range(3):
            function(number)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(calls):
            function(number)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return run


def plain(function: Callable[[int], object], device: str) -> Callable[[], float]:
    """Seconds of one call without a graph: for calls of milliseconds, with a backward pass."""
    if device != "cuda":
        return lambda: seconds_of(lambda: function(0))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        begin.record()
        function(0)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return run


def peak_bytes(function: Callable[[int], object]) -> int:
    """The most bytes of the GPU that a call holds at a time, beyond those allocated before it."""
    if not torch.cuda.is_available():
        function(0)
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes a second of a copy inside a device, read and written: what its memory really does."""
    source = torch.zeros(sizes.copied, dtype=torch.float32, device=sizes.device)
    target = torch.empty_like(source)
    copy = plain(lambda _: target.copy_(source), sizes.device)
    times = interleaved({"copy": copy}, sizes.repeats)["copy"]
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


def matrix_rate(sizes: Sizes, side: int = 8192) -> list[float]:
    """Operations a second of a product of two square bfloat16 matrices, a value a repeat."""
    left, right = torch.randn(2, side, side, device=sizes.device).bfloat16()
    times = interleaved({"product": plain(lambda _: left @ right, sizes.device)}, sizes.repeats)["product"]
    return [2 * side**3 / seconds for seconds in times]


def compared(
    name: str,
    ours: Callable[[int], object],
    others: Mapping[str, Callable[[int], object]],
    sizes: Sizes,
    timer: Timer = captured,
) -> tuple[list[Row], list[float]]:
    """Rows of each other implementation's time ÷ ours, interleaved, with both peaks; and our own seconds."""
    contenders = {"ours": ours, **others}
    peaks = {label: (function(0), peak_bytes(function))[1] for label, function in contenders.items()}
    timed = {label: timer(function, sizes.device) for label, function in contenders.items()}
    times = interleaved(timed, sizes.repeats)
    rows = []
    for label in others:
        note = f"peak {peaks['ours'] / 2**20:.0f} MiB against {peaks[label] / 2**20:.0f}"
        values = ratios(times[label], times["ours"])
        rows.append(row(f"GPU {name}: {label} ÷ ours", values, note=note, device=sizes.name))
    return rows, times["ours"]


def share(name: str, num_bytes: int, times: Sequence[float], bandwidth: float, sizes: Sizes) -> Row:
    """Bytes that must be moved ÷ time, as a share of the measured copy bandwidth."""
    values = [num_bytes / s / bandwidth for s in times]
    note = f"{num_bytes / 2**20:.0f} MiB; copy bandwidth {bandwidth / 1e12:.2f} TB/s"
    return row(f"GPU {name}, share of copy bandwidth", values, 0.75, unit="", note=note, device=sizes.name)


def fixed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the shapes that it is called with."""
    return torch.compile(function, dynamic=False)


def others_of(function: Callable[..., Any], sizes: Sizes) -> dict[str, Callable[..., Any]]:
    """The same in torch, eagerly and, where that is asked for, compiled."""
    return {"eager torch": function} | ({"torch.compile": fixed(function)} if sizes.compiled else {})


def kernel_rows(sizes: Sizes, bandwidth: float) -> Iterator[Row]:
    """All rows of the kernels, each as soon as it is measured."""
    yield from selection_rows(sizes, bandwidth)
    for count in (1, 16):
        yield from attention_rows(sizes, bandwidth, count)
    yield from accept_rows(sizes)
    yield from distill_rows(sizes)


class Turns:
    """Keys and values of a layer [1, H, S, D] four times over.

    Calls read them in turn, so that none is left in the device's cache when it is read again.
    """

    def __init__(self, sizes: Sizes) -> None:
        shape = (2, 1, sizes.heads, sizes.tokens, sizes.width)
        self.kv = [torch.randn(shape, device=sizes.device, dtype=torch.float16).unbind() for _ in range(4)]
        self.bytes = self.kv[0][0].nbytes

    def __call__(self, function: Callable[..., object], *more: object) -> Callable[[int], object]:
        return lambda number: function(*self.kv[number % len(self.kv)], *more)


def selection_rows(sizes: Sizes, bandwidth: float) -> list[Row]:
    turns, name = Turns(sizes), "chunk_select at 16K"
    others = others_of(reference.chunk_select, sizes)
    given = {label: turns(function, sizes.budget) for label, function in others.items()}
    rows, times = compared(name, turns(chunk_select.chunk_select, sizes.budget), given, sizes)
    copied = 4 * sizes.heads * sizes.budget * sizes.width * 2  # keys and values read and written
    return [*rows, share(name, turns.bytes + copied, times, bandwidth, sizes)]


def attention_rows(sizes: Sizes, bandwidth: float, count: int) -> list[Row]:
    """The attention of so many queries at the end of a long cache."""
    turns, name = Turns(sizes), f"verify_attention of {count} at 16K"
    query = torch.randn(1, sizes.heads, count, sizes.width, device=sizes.device, dtype=torch.float16)
    length, offset = torch.tensor([sizes.tokens], device=sizes.device), sizes.tokens - count
    seen = torch.ones(count, sizes.tokens, dtype=torch.bool, device=sizes.device).tril(offset)
    scaling = sizes.width**-0.5

    def ours(k: Tensor, v: Tensor) -> Tensor:
        return verify_attention.verify_attention(query, k, v, scaling, length)

    def eager(k: Tensor, v: Tensor) -> Tensor:
        logits = query @ k.transpose(-1, -2) * scaling
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    def sdpa(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, k, v, attn_mask=None if count == 1 else seen)

    others = {**others_of(eager, sizes), "SDPA": sdpa}
    if sizes.compiled:

        def causal(b, h, q, k):
            return k <= q + offset

        blocks = create_block_mask(causal, None, None, count, sizes.tokens, device=sizes.device)
        flex = fixed(flex_attention)
        others["flex attention"] = lambda k, v: flex(query, k, v, block_mask=blocks)
    given = {label: turns(function) for label, function in others.items()}
    rows, times = compared(name, turns(ours), given, sizes)
    return [*rows, share(name, turns.bytes * 2, times, bandwidth, sizes)]


def distill_rows(sizes: Sizes) -> list[Row]:
    """Forward and backward of the cross entropy at 8192 positions and 128K entries, in bfloat16."""

    def random(rows: int) -> Tensor:
        return torch.randn(rows, sizes.hidden, device=sizes.device, dtype=torch.bfloat16)

    hidden = random(sizes.positions).requires_grad_()
    head = (random(sizes.vocabulary) / 28).requires_grad_()
    labels = torch.randint(sizes.vocabulary, (sizes.positions,), device=sizes.device)

    def whole(hidden: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), labels)

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return distill_loss.cross_entropy(hidden, head, labels, backend="triton").mean()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], object]:
        def run(number: int) -> None:
            loss(hidden, head).backward()
            hidden.grad = head.grad = None

        return run

    others = {label: step(loss) for label, loss in others_of(whole, sizes).items()}
    if find_spec("liger_kernel") and sizes.device == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        others["Liger-Kernel"] = step(lambda hidden, head: liger(head, hidden, labels))
    name = "distill_loss at 8192 × 128K, forward and backward"
    return compared(name, step(ours), others, sizes, plain)[0]


def accept_rows(sizes: Sizes) -> list[Row]:
    rows, gamma, vocabulary = sizes.rounds
    q = torch.randn(rows, gamma, vocabulary, device=sizes.device).softmax(-1)
    p = torch.randn(rows, gamma + 1, vocabulary, device=sizes.device).softmax(-1)
    draft = torch.multinomial(q.flatten(0, 1), 1).reshape(rows, gamma)
    given = (draft, q, p, torch.rand(rows, gamma + 1, device=sizes.device))
    others = {
        label: lambda _, function=function: function(*given)
        for label, function in others_of(reference.rejection_accept, sizes).items()
    }
    return compared("accept, 8 rounds of 16", lambda _: accept.rejection_accept(*given), others, sizes)[0]
