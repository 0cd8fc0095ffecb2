"""Several prompts decoded together at Llama-2-7B's shape: tokens a second, and acceptance row by row.

Random weights, random KV, acceptance by a coin for each row: rows accept independently of each other, and a
round costs what its slowest part costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu.decoding import PAPER_POINTS, PaperPoint, Setting, clock, random_runner
from benchmarks.pairs import NEVER, random_llama
from benchmarks.rows import Row, interleaved, row
from benchmarks.synthetic import synthetic_sampler
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.sampling import GREEDY, Sampler
from pipeline.decode.sources import ModelDrafts
from pipeline.metrics import Counts, Round

PROMPTS = (1, 4, 16)
GAMMA = 8


@torch.no_grad()
def together_rows(
    setting: Setting, point: PaperPoint = PAPER_POINTS[0], prompts: tuple[int, ...] = PROMPTS
) -> Iterator[Row]:
    """For each number of prompts: tokens a second of AR and of speculation, their ratio, the acceptance."""
    target = decode_model(random_llama(setting.dtype, setting.device, **setting.target))
    drafter = decode_model(random_llama(setting.dtype, setting.device, **setting.drafter))
    for count in prompts:
        yield from of_so_many(setting, point, target, drafter, count)


def of_so_many(
    setting: Setting, point: PaperPoint, target: DecodeModel, drafter: DecodeModel, count: int
) -> list[Row]:
    room, compile = setting.room, setting.compile
    verifying = random_runner(target, point.tokens, point.tokens, room, compile, count)
    source = ModelDrafts(random_runner(drafter, point.tokens, setting.budget, room, compile, count))
    firsts, seeds = [5] * count, iter(range(1000))
    rates: list[list[float]] = [[] for _ in firsts]  # of each row, a value a repeat

    def plain() -> float:
        began = clock(setting.device)
        steps = list(autoregressive(verifying, firsts, setting.new_tokens, NEVER, GREEDY))
        return count * len(steps) / (clock(setting.device) - began)

    def speculative() -> float:
        began = clock(setting.device)
        sampler = coins(point, count, setting.device, next(seeds))
        made: list[list[Round]] = [[] for _ in firsts]
        for rounds in speculate(verifying, source, firsts, GAMMA, setting.new_tokens, NEVER, sampler):
            for of_row, round_ in zip(made, rounds, strict=True):
                if round_ is not None:
                    of_row.append(round_)
        seconds = clock(setting.device) - began
        for values, of_row in zip(rates, made, strict=True):
            accepted = Counts.of(of_row, GAMMA).acceptance
            assert accepted is not None, "no round proposed anything"
            values.append(accepted)
        return sum(len(round_.tokens) for of_row in made for round_ in of_row) / seconds

    speeds = interleaved({"AR": plain, "speculation": speculative}, setting.repeats)
    name = f"{count} prompt{'s' * (count > 1)} together, {point.name}"
    gains = [fast / slow for fast, slow in zip(speeds["speculation"], speeds["AR"], strict=True)]
    by_row = ", ".join(f"{sum(values) / len(values):.2f}" for values in rates)
    made = [
        row(f"GPU AR, {name}", speeds["AR"], unit=" tokens/s"),
        row(f"GPU speculation, {name}, γ = {GAMMA}", speeds["speculation"], unit=" tokens/s", synthetic=True),
        row(f"GPU speculation ÷ AR, {name}, γ = {GAMMA}", gains, synthetic=True, note=f"accepted {by_row}"),
    ]
    return [replace(result, device=setting.device) for result in made]


def coins(point: PaperPoint, count: int, device: str, seed: int) -> Sampler:
    """A coin for each row, each with numbers of its own."""
    one = synthetic_sampler(point.acceptance, point.gamma, device)
    generators = [torch.Generator(device).manual_seed(seed * count + number) for number in range(count)]
    return Sampler(one.rule, tuple(generators))
