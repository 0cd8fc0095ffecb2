"""Decoding at Llama-2-7B's shape on a GPU, with random weights: bandwidth, verification, drafts, speculation.

No weights are needed: what is timed does not depend on them. KV caches hold random entries, so that no
prefill is needed either. `rows` takes any device and shape, so that the whole file runs in the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.pairs import NEVER, Ours, Pair, random_llama
from benchmarks.rows import Row, interleaved, median, ratios, row
from benchmarks.synthetic import synthetic_sampler
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.runner import Compile, Runner
from pipeline.decode.sampling import GREEDY, Rule, Sampler
from pipeline.decode.sources import ModelDrafts
from pipeline.kv.views import view_of

LLAMA_7B = {"hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11_008}
LLAMA_68M = {"hidden": 768, "layers": 2, "heads": 12, "intermediate": 3072}


@dataclass(frozen=True)
class PaperPoint:
    """A context of the paper: its acceptance, γ and claimed speedup, and the bandwidth that we aim at."""

    name: str
    tokens: int
    acceptance: float
    gamma: int
    claimed: float
    bandwidth: float | None


PAPER_POINTS = (
    PaperPoint("4K", 4096, 0.68, 50, 6.55, 0.65),
    PaperPoint("8K", 8192, 0.52, 15, 4.46, None),
    PaperPoint("16K", 16_384, 0.34, 10, 2.10, 0.75),
)


@dataclass(frozen=True)
class Setting:
    """What is run and where."""

    device: str = "cuda"
    compile: Compile = "cudagraphs"
    dtype: torch.dtype = torch.bfloat16
    target: dict[str, Any] = field(default_factory=lambda: LLAMA_7B)
    drafter: dict[str, Any] = field(default_factory=lambda: LLAMA_68M)
    points: tuple[PaperPoint, ...] = PAPER_POINTS
    gammas: tuple[int, ...] = (2, 4, 8, 16, 32)
    budget: int = 512  # of speculation
    budgets: tuple[int, ...] = (256, 512, 1024, 2048)  # of draft steps
    new_tokens: int = 256
    repeats: int = 5
    inner: int = 50  # calls in a row that are timed as one

    @property
    def room(self) -> int:
        """Slots for continuation tokens, enough for every γ."""
        return self.new_tokens + max(*self.gammas, *(point.gamma for point in self.points), 16)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_runner(
    model: DecodeModel, tokens: int, kept: int, room: int, compile: Compile, rows: int = 1
) -> Runner:
    """A runner behind prefixes of `tokens`, of which `kept` random entries are in its cache."""
    runner = Runner(model, rows, kept, room, compile)
    generator = torch.Generator(model.geometry.device).manual_seed(0)
    for buffer in (*runner.cache.keys, *runner.cache.values):
        buffer[:, :, :kept].normal_(generator=generator)
    runner.cache.kept_B.fill_(kept)
    runner.cache.prefix_B.fill_(tokens)
    if runner.cache.turns is not None and runner.cache.rotation is not None:
        positions_BR = (tokens + runner.cache.step_R).expand(rows, -1)
        runner.cache.turns = runner.cache.rotation(positions_BR)
    return runner


def of_one(step: Callable[[], object], device: str, inner: int) -> Callable[[], float]:
    """Seconds of one step, timed over `inner` steps in a row without waiting between them."""

    def run() -> float:
        began = clock(device)
        for _ in range(inner):
            step()
        return (clock(device) - began) / inner

    return run


@torch.no_grad()
def check(device: str = "cuda") -> None:
    """Compiled and captured decoding of a small model gives the text of plain decoding, in fp32."""
    shape = {"hidden": 256, "layers": 2, "heads": 4, "intermediate": 512}
    large, small = (random_llama(torch.float32, device, **shape) for _ in range(2))
    prompt = torch.randint(3, 32_000, (1, 300), device=device)
    texts = {}
    for compile in ("none", "inductor", *(("cudagraphs",) if device == "cuda" else ())):
        ours = Ours(Pair("check", large, small, [prompt], 40), view_of("chunk_topk", 64), 5, compile)
        texts[f"AR, {compile}"] = ours.plain(0)[0]
        texts[f"speculation, {compile}"] = ours.speculation(0, 5)[0]
    for name, text in texts.items():
        assert text == texts["AR, none"], f"{name} differs from plain autoregressive decoding"
    print("  decoding in every compile mode gives one text", flush=True)


@torch.no_grad()
def rows(setting: Setting, bandwidth: float, name: str) -> Iterator[Row]:
    """All rows of decoding on this device, each as soon as it is measured.

    Args:
        bandwidth: its measured copy bandwidth, bytes a second.
        name: the device's.
    """
    large = random_llama(setting.dtype, setting.device, **setting.target)
    small = random_llama(setting.dtype, setting.device, **setting.drafter)
    weights = (weights_read(large), weights_read(small))
    target, drafter = decode_model(large), decode_model(small)
    for made in (
        [draft_row(setting, drafter)],
        *(point_rows(setting, point, target, drafter, weights, bandwidth) for point in setting.points),
    ):
        for result in made:
            yield replace(result, device=name)


def point_rows(
    setting: Setting,
    point: PaperPoint,
    target: DecodeModel,
    drafter: DecodeModel,
    weights: tuple[int, int],
    bandwidth: float,
) -> Iterator[Row]:
    """One context: AR and verification, speculation under synthetic acceptance, every latency."""
    runner = random_runner(target, point.tokens, point.tokens, setting.room, setting.compile)
    plain, verified = step_times(setting, runner)
    read = weights[0] + target.geometry.num_bytes(1, point.tokens)
    yield row(
        f"GPU AR at Llama-2-7B's shape, {point.name}, share of copy bandwidth",
        [read / seconds / bandwidth for seconds in plain],
        point.bandwidth,
        unit="",
        note=f"{1e3 * sorted(plain)[len(plain) // 2]:.2f} ms a token",
    )
    wanted = 1.15 if point.name == PAPER_POINTS[-1].name else None
    label = f"GPU verify of 16 tokens ÷ one AR step, {point.name}"
    yield row(label, ratios(verified, plain), wanted, at_most=True)
    drafting = random_runner(drafter, point.tokens, setting.budget, setting.room, setting.compile)
    yield from speculation_rows(setting, point, runner, drafting)
    yield from step_rows(setting, point, runner, drafter, plain, weights, bandwidth)


def weights_read(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads: all but the embedding, unless it is the head too."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else embedding.nbytes)


def draft_row(setting: Setting, drafter: DecodeModel) -> Row:
    runner = random_runner(drafter, 4096, setting.budget, setting.room, setting.compile)
    pair_12 = torch.full((1, 2), 5, device=setting.device)
    step_1 = torch.full((1,), 3, device=setting.device)
    draft = partial(runner.draft, Rule(), 16, pair_12, step_1, None)
    times = interleaved({"draft": of_one(draft, setting.device, setting.inner)}, setting.repeats)["draft"]
    label = f"GPU draft step of a 68M drafter, B = {setting.budget}, in a graph"
    return row(label, [1e3 * seconds / 16 for seconds in times], 0.2, at_most=True, unit=" ms")


def step_times(setting: Setting, runner: Runner) -> tuple[list[float], list[float]]:
    """Seconds of an AR step, and of verifying 16 tokens."""
    device = setting.device
    pair_12, zero_1 = torch.full((1, 2), 5, device=device), torch.zeros(1, dtype=torch.long, device=device)
    draft, best = torch.full((1, 15), 5, device=device), torch.ones(1, 15, device=device)
    token_11 = pair_12[:, 1:].contiguous()
    advance = partial(runner.advance, Rule(), token_11, zero_1, None)
    verify = partial(runner.verify, Rule(), pair_12, draft, zero_1, best, None, None, zero_1 + 15)
    runs = {
        "advance": of_one(advance, device, setting.inner),
        "verify": of_one(verify, device, setting.inner),
    }
    times = interleaved(runs, setting.repeats)
    return times["advance"], times["verify"]


def step_rows(
    setting: Setting,
    point: PaperPoint,
    runner: Runner,
    drafter: DecodeModel,
    plain: Sequence[float],
    weights: tuple[int, int],
    bandwidth: float,
) -> Iterator[Row]:
    """Latencies at one context, with the share of the copy bandwidth at which weights and KV are read once.

    Args:
        runner: the target behind its prefix; graphs that speculation has captured on it are reused.
        plain: seconds of its AR steps.
        weights: bytes that a pass of target and of drafter reads beside the KV.
        bandwidth: measured copy bandwidth, bytes a second.
    """
    device, gammas = setting.device, sorted({*setting.gammas, point.gamma})
    sampler = synthetic_sampler(point.acceptance, point.gamma, device)
    pair_12, zero_1 = torch.full((1, 2), 5, device=device), torch.zeros(1, dtype=torch.long, device=device)
    read = weights[0] + runner.model.geometry.num_bytes(1, point.tokens)

    yield latency(f"GPU AR step, {point.name}", plain, read, bandwidth)
    for gamma in gammas:
        draft_1T = torch.full((1, gamma), 5, device=device)
        best_1T = torch.ones(1, gamma, device=device, dtype=setting.dtype)
        uniforms_1T1 = sampler.uniforms(gamma + 1)
        verify = partial(runner.verify, sampler.rule, pair_12, draft_1T, zero_1, best_1T, None, uniforms_1T1)
        times = timed(partial(verify, zero_1 + gamma), setting)
        yield latency(f"GPU verify, {point.name}, γ = {gamma}", times, read, bandwidth)
    for budget in setting.budgets:
        drafting = random_runner(drafter, point.tokens, budget, setting.room, setting.compile)
        read = weights[1] + drafter.geometry.num_bytes(1, budget)
        for gamma in gammas:
            uniforms_T1 = sampler.uniforms(gamma, by_row=False)
            draft = partial(drafting.draft, sampler.rule, gamma, pair_12, zero_1 + 3, uniforms_T1)
            name = f"GPU draft, {point.name}, B = {budget}, γ = {gamma}"
            yield latency(name, timed(draft, setting), gamma * read, bandwidth)


def timed(step: Callable[[], object], setting: Setting) -> list[float]:
    return interleaved({"step": of_one(step, setting.device, setting.inner)}, setting.repeats)["step"]


def latency(name: str, times: Sequence[float], num_bytes: int, bandwidth: float) -> Row:
    """Milliseconds; in the note, the share of the bandwidth with its interval."""
    share, low, high = median([num_bytes / seconds / bandwidth for seconds in times])
    note = f"{share:.2f} [{low:.2f}, {high:.2f}] of copy bandwidth"
    return row(name, [1e3 * seconds for seconds in times], unit=" ms", note=note)


def speculation_rows(setting: Setting, point: PaperPoint, target: Runner, drafter: Runner) -> list[Row]:
    """Every γ against AR; the best one against the paper's claim."""
    speedups = speculation(setting, point, target, drafter)
    # The best γ is chosen on some repeats and reported on the others, so that the choice does not flatter.
    half = max(1, setting.repeats // 3)
    best = max(speedups, key=lambda gamma: median(speedups[gamma][:half])[0])
    made = []
    for gamma, values in speedups.items():
        notes = [f"acceptance {point.acceptance} at γ = {point.gamma}"]
        notes += ["the paper's γ"] * (gamma == point.gamma) + ["best γ"] * (gamma == best)
        label = f"GPU speculation ÷ our graphed AR, {point.name}, γ = {gamma}"
        wanted = point.claimed if gamma in (best, point.gamma) else None
        made.append(row(label, values[half:], wanted, synthetic=True, note=", ".join(notes)))
    return made


def speculation(
    setting: Setting, point: PaperPoint, target: Runner, drafter: Runner
) -> dict[int, list[float]]:
    """Speedup over AR for every γ, repeat by repeat, interleaved."""
    source = ModelDrafts(drafter)

    def plain() -> float:
        began = clock(setting.device)
        count = sum(1 for _ in autoregressive(target, [5], setting.new_tokens, NEVER, GREEDY))
        return (clock(setting.device) - began) / count

    def speculative(gamma: int, sampler: Sampler) -> float:
        began = clock(setting.device)
        rounds = list(speculate(target, source, [5], gamma, setting.new_tokens, NEVER, sampler))
        seconds = clock(setting.device) - began
        return seconds / sum(len(round_.tokens) for (round_,) in rounds if round_ is not None)

    gammas = sorted({*setting.gammas, point.gamma})
    speedups: dict[int, list[float]] = {gamma: [] for gamma in gammas}
    for repeat in range(setting.repeats + 1):
        for gamma in gammas:
            sampler = synthetic_sampler(point.acceptance, point.gamma, setting.device, seed=repeat)
            ratio = plain() / speculative(gamma, sampler)
            if repeat:  # the first repeat compiles
                speedups[gamma].append(ratio)
    return speedups


def missing_rows() -> list[Row]:
    """The rows that need a GPU, empty, for a machine without one."""
    names: list[tuple[str, float, bool, bool]] = [
        ("draft step of a 68M drafter, B = 512, in a graph", 0.2, True, False),
        ("chunk_select at 16K, share of copy bandwidth", 0.75, False, False),
        ("verify_attention of 16 at 16K, share of copy bandwidth", 0.75, False, False),
        ("verify of 16 tokens ÷ one AR step, 16K", 1.15, True, False),
    ]
    for point in PAPER_POINTS:
        if point.bandwidth:
            label = f"AR at Llama-2-7B's shape, {point.name}, share of copy bandwidth"
            names.append((label, point.bandwidth, False, False))
        for gamma in (f"γ = {point.gamma}", "best γ"):
            names.append((f"speculation ÷ our graphed AR, {point.name}, {gamma}", point.claimed, False, True))
    return [
        row(f"GPU {label}", [], target, at_most=at_most, synthetic=synthetic)
        for label, target, at_most, synthetic in names
    ]
