"""A head on a GPU: its text in every compile mode, and its chains beside a step of its target.

Random weights and random features: what is timed does not depend on them, and what a chain proposes is hardly
ever accepted, so that no speedup is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.decoding import PaperPoint, Setting, random_runner, step_times, timed
from benchmarks.pairs import NEVER, random_llama
from benchmarks.rows import Row, ratios, row
from pipeline.axes import FULL, View
from pipeline.decode.feature_head import HeadDrafts, LeanHead
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Compile, Runner
from pipeline.decode.sampling import GREEDY
from pipeline.decode.target_reader import TargetReader
from pipeline.kv.slot_cache import slots_for
from pipeline.kv.views import span_of
from pipeline.models.heads.begin import head_of

WINDOW = View("window", 64, sinks=4)


def head_over(target: PreTrainedModel, dtype: torch.dtype, layers: tuple[int, ...]) -> LeanHead:
    """An untrained head over the target's whole vocabulary."""
    with torch.device(target.device):
        tokens_V = torch.arange(target.whole_tokens)
        module = head_of(target, tokens_V, layers).to(target.device, dtype)
    return LeanHead(module, TargetReader(decode_model(target)))


@torch.no_grad()
def texts(device: str, compile: Compile, view: View, prompt: Tensor) -> tuple[list[int], list[int]]:
    """Autoregressive text and that of speculation with a head behind a view; a small model in fp32."""
    limit, gamma = 24, 4
    target = random_llama(torch.float32, device, hidden=256, layers=6, heads=4, intermediate=512)
    small = head_over(target, torch.float32, (1, 3, 5))
    large = small.reader.target
    (whole,), logits = large.prefill(prompt, [(prompt.shape[1], FULL)])
    kept, _ = small.prefill(prompt, [(prompt.shape[1], view)])
    runners = []
    for model, behind in ((large, whole), (small, kept[0])):
        runner = Runner(model, 1, slots_for(behind.kept), limit + gamma, compile)
        runner.cache.load([behind])
        runners.append(runner)
    first = int(logits.argmax())
    plain = [first]
    for (token,) in autoregressive(runners[0], [first], limit, NEVER, GREEDY):
        plain += [] if token is None else [token]
    assert kept[0].last is not None
    source, drafted = HeadDrafts(runners[1], kept[0].last), [first]
    for (one,) in speculate(runners[0], source, [first], gamma, limit, NEVER, GREEDY):
        drafted += one.tokens if one is not None else ()
    return plain, drafted


def check_rows(device: str) -> Iterator[Row]:
    """How many of the texts differ, over compile modes and views."""
    prompt = torch.randint(3, 32_000, (1, 150), generator=torch.Generator().manual_seed(0)).to(device)
    modes: tuple[Compile, ...] = ("none", "inductor", "cudagraphs") if device == "cuda" else ("none",)
    different = 0
    for compile in modes:
        for view in (FULL, WINDOW):
            plain, drafted = texts(device, compile, view, prompt)
            different += plain != drafted
    note = f"{len(modes)} compile modes; the whole cache and a window"
    yield row(
        "GPU texts of a head that are not AR's", [float(different)], 0.0, at_most=True, unit="", note=note
    )


@torch.no_grad()
def chain_rows(setting: Setting, point: PaperPoint) -> Iterator[Row]:
    """Chains of a head over a target of the setting's shape, in steps of that target, behind two views."""
    target = random_llama(setting.dtype, setting.device, **setting.target)
    layers = setting.target["layers"]
    reads = (2, layers // 2, layers - 3) if layers > 5 else (0,)
    small = head_over(target, setting.dtype, reads)
    runner = random_runner(small.reader.target, point.tokens, point.tokens, setting.room, setting.compile)
    plain, _ = step_times(setting, runner)
    for view in (FULL, View("window", min(1024, point.tokens // 2), sinks=0)):
        kept = point.tokens if view.budget == "full" else view.budget
        drafting = random_runner(small, point.tokens, kept, setting.room, setting.compile)
        drafting.cache.span = span_of(view)
        last_BF = torch.randn(1, small.module.fc.in_features, device=setting.device, dtype=setting.dtype)
        for gamma in setting.gammas:
            source = HeadDrafts(drafting, last_BF)
            token_11 = torch.full((1, 1), 5, device=setting.device)
            step_1 = torch.full((1,), 3, device=setting.device)
            chain = partial(source.propose, GREEDY, gamma, token_11, step_1, [True])
            seconds = timed(chain, setting)
            label = f"GPU chain of a head ÷ one AR step, {point.name}, {view.name}, γ = {gamma}"
            note = f"{1e3 * sorted(seconds)[len(seconds) // 2]:.2f} ms"
            yield replace(row(label, ratios(seconds, plain), note=note), device=setting.device)
