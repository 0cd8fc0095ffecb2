"""Each Triton kernel against eager torch, compiled torch and the library's: time, peak memory, bandwidth.

Runs on a bare GPU machine with torch, triton and transformers. Liger-Kernel's fused cross entropy is compared
where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.rows import Row, gpu_name, ratios, row
from kernels import accept, chunk_select, distill_loss, reference, verify_attention

TOKENS, HEADS, WIDTH, BUDGET = 16_384, 32, 128, 1024  # a layer of Llama-2-7B at 16K
POSITIONS, HIDDEN, VOCABULARY = 8192, 768, 131_072


def seconds(function: Callable[[], object], repeats: int = 20) -> list[float]:
    """Seconds of each of `repeats` calls, by the device's own clock."""
    for _ in range(3):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def peak_bytes(function: Callable[[], object]) -> int:
    """Bytes that a call allocates at most, beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written: what this GPU's memory really does."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    times = seconds(lambda: target.copy_(source))
    return 2 * source.nbytes / sorted(times)[len(times) // 2]


def compared(
    name: str, ours: Callable[[], object], others: Mapping[str, Callable[[], object]]
) -> tuple[list[Row], list[float]]:
    """Time of each other way ÷ ours, with both peaks; and our own seconds."""
    own, own_peak = seconds(ours), peak_bytes(ours)
    rows = []
    for label, function in others.items():
        times, peak = seconds(function), peak_bytes(function)
        note = f"peak {own_peak / 2**20:.0f} MiB against {peak / 2**20:.0f}"
        rows.append(row(f"GPU {name}: {label} ÷ ours", ratios(times, own), note=note, device=gpu_name()))
    return rows, own


def share(name: str, num_bytes: int, times: Sequence[float], bandwidth: float, target: float | None) -> Row:
    """Bytes that must be moved ÷ time, as a share of the measured copy bandwidth."""
    values = [num_bytes / s / bandwidth for s in times]
    note = f"{num_bytes / 2**20:.0f} MiB; copy bandwidth {bandwidth / 1e12:.2f} TB/s"
    return row(f"GPU {name}, share of copy bandwidth", values, target, unit="", note=note, device=gpu_name())


def random_kv(dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, HEADS, TOKENS, WIDTH)
    keys, values = (torch.randn(shape, generator=generator, device="cuda", dtype=dtype) for _ in range(2))
    return keys, values


def check() -> None:
    """Every kernel against its oracle; nothing is timed if one differs."""
    keys, values = random_kv(torch.float32)
    found, oracle = (f(keys, values, BUDGET) for f in (chunk_select.chunk_select, reference.chunk_select))
    same = (found[2] == oracle[2]).float().mean()
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
    for ours, theirs in zip(
        accept.rejection_accept(draft, q, p, uniforms),
        reference.rejection_accept(draft, q, p, uniforms),
        strict=True,
    ):
        assert (ours == theirs).float().mean() >= 0.95, "accept differs from its oracle"
    print("  all kernels equal their oracles", flush=True)


def rounds(rows: int = 8, gamma: int = 16, vocabulary: int = 32_000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = torch.randn(rows, gamma, vocabulary, device="cuda").softmax(-1)
    p = torch.randn(rows, gamma + 1, vocabulary, device="cuda").softmax(-1)
    draft = torch.multinomial(q.flatten(0, 1), 1).reshape(rows, gamma)
    return draft, q, p, torch.rand(rows, gamma + 1, device="cuda")


def kernel_rows(bandwidth: float) -> list[Row]:
    keys, values = random_kv()
    select = partial(chunk_select.chunk_select, keys, values, BUDGET)
    oracle = partial(reference.chunk_select, keys, values, BUDGET)
    rows, times = compared(
        "chunk_select at 16K",
        select,
        {
            "eager torch": oracle,
            "torch.compile": partial(torch.compile(reference.chunk_select), keys, values, BUDGET),
        },
    )
    kept_bytes = 4 * HEADS * BUDGET * WIDTH * keys.element_size()
    rows.append(share("chunk_select at 16K", keys.nbytes + kept_bytes, times, bandwidth, 0.75))

    compiled_flex = torch.compile(flex_attention)
    for count in (1, 16):
        query = torch.randn(1, HEADS, count, WIDTH, device="cuda", dtype=torch.float16)
        length = torch.tensor([TOKENS], device="cuda")
        arguments = (query, keys, values, WIDTH**-0.5, length)
        offset = TOKENS - count
        mask = torch.ones(count, TOKENS, dtype=torch.bool, device="cuda").tril(offset)

        def seen(b, h, q, k, offset=offset):
            return k <= q + offset

        blocks = create_block_mask(seen, None, None, count, TOKENS, device="cuda")
        others = {
            "eager torch": partial(reference.verify_attention, *arguments),
            "torch.compile": partial(torch.compile(reference.verify_attention), *arguments),
            "SDPA": partial(F.scaled_dot_product_attention, query, keys, values, attn_mask=mask),
            "flex attention": partial(compiled_flex, query, keys, values, block_mask=blocks),
        }
        made, times = compared(
            f"verify_attention of {count} at 16K",
            partial(verify_attention.verify_attention, *arguments),
            others,
        )
        rows += made
        rows.append(
            share(f"verify_attention of {count} at 16K", keys.nbytes + values.nbytes, times, bandwidth, 0.75)
        )
    del keys, values
    return [*rows, *distill_rows(), *accept_rows()]


def distill_rows() -> list[Row]:
    """Forward and backward of the cross entropy at 8192 positions and 128K entries, in bfloat16."""
    hidden = torch.randn(POSITIONS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16) / 28).requires_grad_()
    labels = torch.randint(VOCABULARY, (POSITIONS,), device="cuda")

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), labels)

    def run(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        loss(hidden, head).backward()
        hidden.grad = head.grad = None

    def ours(hidden: Tensor, head: Tensor) -> Tensor:
        return distill_loss.cross_entropy(hidden, head, labels, backend="triton").mean()

    others = {"eager torch": partial(run, plain), "torch.compile": partial(run, torch.compile(plain))}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        others["Liger-Kernel"] = partial(run, lambda hidden, head: liger(head, hidden, labels))
    return compared("distill_loss at 8192 × 128K, forward and backward", partial(run, ours), others)[0]


def accept_rows() -> list[Row]:
    given = rounds()
    others = {
        "eager torch": partial(reference.rejection_accept, *given),
        "torch.compile": partial(torch.compile(reference.rejection_accept), *given),
    }
    return compared("accept, 8 rounds of 16", partial(accept.rejection_accept, *given), others)[0]
