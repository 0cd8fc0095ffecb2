"""Single steps of decoding, timed: what predictions of speed are made of.

The prompts are random tokens, which are in no data set: what a step takes depends on shapes, not on text. The
steps are timed inside real rounds, where models and caches compete for the processor as they will. On a GPU
each step is waited for, which real rounds do not do: predicted rounds are a little too slow there.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.axes import View
from pipeline.config.sweep import Sweep
from pipeline.decode.bench import Bench, clock
from pipeline.decode.loop import speculate
from pipeline.decode.model import DecodeModel
from pipeline.decode.runner import Runners
from pipeline.decode.sampling import GREEDILY
from pipeline.kv.guides import are_guided
from pipeline.store.rows import Prompt, StepTimes
from pipeline.sweep.grid import Drafter, views_of
from pipeline.sweep.measurer import Views

MOST_GAMMAS = 4  # of the sweep's that are timed, beside 1; verification at other γ is interpolated
REPEATS = 5
TOKENS = 17  # of one run's text, first one included
NEVER: frozenset[int] = frozenset()


class Watched:
    """Wraps an object and keeps the seconds of every call of one of its methods."""

    def __init__(self, inner: Any, method: str, device: torch.device) -> None:
        self.inner, self.device = inner, device
        self.seconds: list[float] = []
        setattr(self, method, self.timed(getattr(inner, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            began = clock(self.device)
            result = call(*arguments)
            self.seconds.append(clock(self.device) - began)
            return result

        return run


class RoundTimes(NamedTuple):
    """Seconds of a run: of drafting and of verifying in each round, and the mean of a round's rest."""

    draft_s: list[float]
    verify_s: list[float]
    rest_s: float


def step_times(
    sweep: Sweep,
    runners: Runners,
    target: DecodeModel,
    drafter: Drafter,
    model: DecodeModel | None,
    prompt: Prompt,
    new_tokens: int,
) -> list[StepTimes]:
    """One row for each view of a draft source; its runs are interleaved with autoregressive ones.

    Args:
        new_tokens: of the texts that are predicted; the caches are sized for them.
    """
    behind = [view for view in views_of(sweep, drafter) if not view.control]
    if drafter.baseline is None:  # another policy keeps other entries, but as many
        behind = [view for view in behind if view.policy == sweep.policies[0]]
    gammas = spread(sweep.gammas_of(prompt.context))
    self_views = behind if drafter.role == "target" else []
    guided = are_guided(behind)
    bench = Bench(runners, target, [prompt], max(sweep.gammas), self_views, new_tokens, guided=guided)
    views = Views(bench, drafter, model, behind)
    # A source without a model takes one step a round, however many tokens it proposes.
    by_round = model is None
    drafts: dict[View, list[float]] = defaultdict(list)
    verifies: dict[tuple[View, int], list[float]] = defaultdict(list)
    rests: dict[View, list[float]] = defaultdict(list)
    plain: list[float] = []
    for repeat in range(REPEATS + 1):
        run = bench.autoregressive(GREEDILY, NEVER)
        if repeat:  # the first of each shape is slow
            plain.append(run.seconds / (len(run.tokens[0]) - 1))
        for view in behind:
            for gamma in gammas:
                times = one_run(bench, views, view, gamma)
                if repeat:
                    drafts[view].append(fmean(times.draft_s) / (1 if by_round else gamma))
                    verifies[view, gamma].append(fmean(times.verify_s))
                    rests[view].append(times.rest_s)
    return [
        StepTimes(
            context=prompt.context,
            prompt_tokens=len(prompt.tokens),
            kind=drafter.baseline or "drafter",
            policy=view.policy,
            budget=view.budget,
            draft_s=median(drafts[view]),
            verify_s={gamma: median(verifies[view, gamma]) for gamma in gammas},
            round_s=median(rests[view]),
            ar_s=median(plain),
        )
        for view in behind
    ]


def one_run(bench: Bench, views: Views, view: View, gamma: int) -> RoundTimes:
    source = Watched(views.source(view), "propose", bench.device)
    target: Any = Watched(bench.target, "verify", bench.device)
    firsts, sampler = bench.start(GREEDILY)
    began = clock(bench.device)
    count = len(list(speculate(target, source, firsts, gamma, bench.limit, NEVER, sampler)))
    seconds = clock(bench.device) - began
    rest = seconds - sum(source.seconds) - sum(target.seconds)
    return RoundTimes(source.seconds, target.seconds, rest / count)


def random_prompt(context: str, prompt_tokens: int, num_tokens: int, new_tokens: int) -> Prompt:
    draw = random.Random(f"{context}/{prompt_tokens}")
    return Prompt(
        prompt_id=f"calibration/{context}",
        document_id="random tokens",
        dataset="calibration",
        context=context,
        split="test",
        tokens=[draw.randrange(num_tokens) for _ in range(prompt_tokens)],
        max_new_tokens=min(TOKENS, new_tokens),
    )


def spread(gammas: Sequence[int]) -> list[int]:
    """1, the smallest, the largest and some between."""
    places = np.linspace(0, len(gammas) - 1, min(MOST_GAMMAS, len(gammas))).round().astype(int)
    return sorted({1, *(sorted(gammas)[place] for place in places.tolist())})
