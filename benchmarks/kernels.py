"""Each Triton kernel against eager torch, compiled torch and the library's: time, peak memory, bandwidth.

Runs on a bare GPU machine with torch, triton and transformers. Liger-Kernel's fused cross entropy is compared
where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.rows import Row, interleaved, ratios, row
from kernels import accept, chunk_select, distill_loss, reference, verify_attention
from pipeline.hardware import gpu_name

TOKENS, HEADS, WIDTH, BUDGET = 16_384, 32, 128, 1024  # a layer of Llama-2-7B at 16K
POSITIONS, HIDDEN, VOCABULARY = 8192, 768, 131_072


def captured(function: Callable[[int], object], calls: int = 10) -> Callable[[], float]:
    """Seconds of one call by the device's clock, in a CUDA graph of several calls: launching costs nothing.

    `function` is given the call's number, so that each call can read other memory than the one before.
    """
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


def plain(function: Callable[[int], object]) -> Callable[[], float]:
    """Seconds of one call without a graph: for calls of milliseconds, with a backward pass."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        begin.record()
        function(0)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    return run


def peak_bytes(function: Callable[[int], object]) -> int:
    """The most bytes that a call holds at a time, beyond those allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written: what this GPU's memory really does."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    times = interleaved({"copy": plain(lambda _: target.copy_(source))}, 20)["copy"]
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


def compared(
    name: str,
    ours: Callable[[int], object],
    others: Mapping[str, Callable[[int], object]],
    timer: Callable[[Callable[[int], object]], Callable[[], float]] = captured,
) -> tuple[list[Row], list[float]]:
    """Rows of each other implementation's time ÷ ours, interleaved, with both peaks; and our own seconds."""
    contenders = {"ours": ours, **others}
    peaks = {label: (function(0), peak_bytes(function))[1] for label, function in contenders.items()}
    times = interleaved({label: timer(function) for label, function in contenders.items()}, 20)
    rows = []
    for label in others:
        note = f"peak {peaks['ours'] / 2**20:.0f} MiB against {peaks[label] / 2**20:.0f}"
        values = ratios(times[label], times["ours"])
        rows.append(row(f"GPU {name}: {label} ÷ ours", values, note=note, device=gpu_name()))
    return rows, times["ours"]


def share(name: str, num_bytes: int, times: Sequence[float], bandwidth: float, target: float | None) -> Row:
    """Bytes that must be moved ÷ time, as a share of the measured copy bandwidth."""
    values = [num_bytes / s / bandwidth for s in times]
    note = f"{num_bytes / 2**20:.0f} MiB; copy bandwidth {bandwidth / 1e12:.2f} TB/s"
    return row(f"GPU {name}, share of copy bandwidth", values, target, unit="", note=note, device=gpu_name())


def random_kv(dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    shape = (1, HEADS, TOKENS, WIDTH)
    return torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape, device="cuda", dtype=dtype)


def check() -> None:
    """Every kernel against its oracle; nothing is timed if one differs."""
    keys, values = random_kv(torch.float32)
    selected, oracle = (f(keys, values, BUDGET) for f in (chunk_select.chunk_select, reference.chunk_select))
    same = (selected[2] == oracle[2]).float().mean()
    assert same > 0.99, f"chunk_select keeps other entries than its oracle: {same:.4f} are the same"
    keys, values = keys.half(), values.half()
    for count in (1, 16):
        query = torch.randn(1, HEADS, count, WIDTH, device="cuda", dtype=torch.float16)
        length = torch.tensor([TOKENS - 3], device="cuda")
        arguments = (query, keys, values, WIDTH**-0.5, length)
        torch.testing.assert_close(
            verify_attention.verify_attention(*arguments), reference.verify_attention(*arguments),
            atol=2e-3, rtol=2e-2,
        )  # fmt: skip
    hidden = torch.randn(256, HIDDEN, device="cuda")
    head, labels = (
        torch.randn(32_000, HIDDEN, device="cuda") / 28,
        torch.randint(32_000, (256,), device="cuda"),
    )
    torch.testing.assert_close(
        distill_loss.cross_entropy(hidden, head, labels, backend="triton"),
        reference.cross_entropy(hidden @ head.T, labels), atol=1e-3, rtol=1e-3,
    )  # fmt: skip
    draft, q, p, uniforms = rounds()
    for ours, theirs in (
        (accept.rejection_accept(draft, q, p, uniforms), reference.rejection_accept(draft, q, p, uniforms)),
        (accept.greedy_accept(draft, p.argmax(-1)), reference.greedy_accept(draft, p.argmax(-1))),
    ):
        assert all((a == b).float().mean() >= 0.95 for a, b in zip(ours, theirs, strict=True)), "accept"
    check_gradients(head)
    print("  all kernels equal their oracles", flush=True)


def check_gradients(head: Tensor) -> None:
    """The losses from top-k labels, and their gradients, in half precision against fp32 logits."""
    hidden = torch.randn(256, HIDDEN, device="cuda")
    top = (hidden @ head.T + torch.randn(256, len(head), device="cuda")).log_softmax(-1).topk(32)
    for name in ("kl", "total_variation"):
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            h, w = (tensor.to(dtype).requires_grad_() for tensor in (hidden, head))
            if dtype == torch.float32:
                loss = getattr(reference, name)(h @ w.T, top.indices, top.values, 1.0)
            else:
                loss = getattr(distill_loss, name)(h, w, top.indices, top.values, 1.0, backend="triton")
            results.append((loss, *torch.autograd.grad(loss.mean(), (h, w))))
        for exact, ours in zip(*results, strict=True):
            error = (ours.float() - exact).norm() / exact.norm()
            assert error < 0.05, f"{name} or its gradient differs from the oracle's by {error:.3f}"


def rounds(rows: int = 8, gamma: int = 16, vocabulary: int = 32_000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(rows, gamma, vocabulary, device="cuda").softmax(-1)
    p = torch.randn(rows, gamma + 1, vocabulary, device="cuda").softmax(-1)
    draft = torch.multinomial(q.flatten(0, 1), 1).reshape(rows, gamma)
    return draft, q, p, torch.rand(rows, gamma + 1, device="cuda")


def fixed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for the shapes that it is called with."""
    return torch.compile(function, dynamic=False)


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Attention as three operations in the input's type; entries in `hidden` [Q, S] are masked."""
    logits = query @ keys.transpose(-1, -2) * WIDTH**-0.5
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values


def kernel_rows(bandwidth: float) -> list[Row]:
    """All rows of the kernels. Calls read four K and V in turn, so that none is left in the L2 cache."""
    kv = [random_kv() for _ in range(4)]

    def in_turn(function: Callable[..., object], *more: object) -> Callable[[int], object]:
        return lambda number: function(*kv[number % len(kv)], *more)

    keys = kv[0][0]
    rows, times = compared(
        "chunk_select at 16K",
        in_turn(chunk_select.chunk_select, BUDGET),
        {
            "eager torch": in_turn(reference.chunk_select, BUDGET),
            "torch.compile": in_turn(fixed(reference.chunk_select), BUDGET),
        },
    )
    kept_bytes = 4 * HEADS * BUDGET * WIDTH * keys.element_size()
    rows.append(share("chunk_select at 16K", keys.nbytes + kept_bytes, times, bandwidth, 0.75))

    for count in (1, 16):
        query = torch.randn(1, HEADS, count, WIDTH, device="cuda", dtype=torch.float16)
        length, offset = torch.tensor([TOKENS], device="cuda"), TOKENS - count
        seen = torch.ones(count, TOKENS, dtype=torch.bool, device="cuda").tril(offset)
        mask = None if count == 1 else seen

        def ours(k: Tensor, v: Tensor, query: Tensor = query, length: Tensor = length) -> Tensor:
            return verify_attention.verify_attention(query, k, v, WIDTH**-0.5, length)

        def eager(k: Tensor, v: Tensor, query: Tensor = query, hidden: Tensor = ~seen) -> Tensor:
            return plain_attention(query, k, v, hidden)

        def sdpa(k: Tensor, v: Tensor, query: Tensor = query, mask: Tensor | None = mask) -> Tensor:
            return F.scaled_dot_product_attention(query, k, v, attn_mask=mask)

        def causal(b, h, q, k, offset=offset):
            return k <= q + offset

        blocks = create_block_mask(causal, None, None, count, TOKENS, device="cuda")
        flexed = fixed(flex_attention)

        def flex(k: Tensor, v: Tensor, query: Tensor = query, blocks: Any = blocks, run: Any = flexed) -> Any:
            return run(query, k, v, block_mask=blocks)

        name = f"verify_attention of {count} at 16K"
        others = {"eager torch": eager, "torch.compile": fixed(eager), "SDPA": sdpa, "flex attention": flex}
        made, times = compared(
            name, in_turn(ours), {label: in_turn(other) for label, other in others.items()}
        )
        rows += [*made, share(name, keys.nbytes * 2, times, bandwidth, 0.75)]
    return [*rows, *distill_rows(), *accept_rows()]


def distill_rows() -> list[Row]:
    """Forward and backward of the cross entropy at 8192 positions and 128K entries, in bfloat16."""
    hidden = torch.randn(POSITIONS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16) / 28).requires_grad_()
    labels = torch.randint(VOCABULARY, (POSITIONS,), device="cuda")

    def whole(hidden: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), labels)

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return distill_loss.cross_entropy(hidden, head, labels, backend="triton").mean()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], object]:
        def run(number: int) -> None:
            loss(hidden, head).backward()
            hidden.grad = head.grad = None

        return run

    others = {"eager torch": step(whole), "torch.compile": step(fixed(whole))}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        others["Liger-Kernel"] = step(lambda hidden, head: liger(head, hidden, labels))
    return compared("distill_loss at 8192 × 128K, forward and backward", step(ours), others, plain)[0]


def accept_rows() -> list[Row]:
    given = rounds()
    compiled = fixed(reference.rejection_accept)
    others = {
        "eager torch": lambda _: reference.rejection_accept(*given),
        "torch.compile": lambda _: compiled(*given),
    }
    return compared("accept, 8 rounds of 16", lambda _: accept.rejection_accept(*given), others)[0]
