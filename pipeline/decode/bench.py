"""Wall clock of prompts decoded together: autoregressive decoding and speculation, run after run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from pipeline.axes import FULL, View
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import DecodeModel
from pipeline.decode.runner import Runner, Runners
from pipeline.decode.sampling import Chance, Sampler
from pipeline.decode.sources import DraftSource
from pipeline.hardware import peak_bytes
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.slot_cache import capacity_of, slots_for
from pipeline.kv.views import PrefixView
from pipeline.metrics import Departure, Round, Scored

if TYPE_CHECKING:  # rows need pydantic, which a bare machine lacks
    from pipeline.store.rows import Prompt

T = TypeVar("T")


@dataclass(frozen=True)
class Timed:
    """One timed run; `tokens` of each prompt begin with the one that the prefill gives.

    On a CPU, peak memory is that of the process.
    """

    tokens: list[list[int]]
    rounds: list[list[Round]]
    seconds: float
    peak_memory_bytes: int


def clock(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_prefill(
    model: DecodeModel,
    prompt: Prompt,
    views: Sequence[View],
    rehearse: bool = False,
    guides: Guides = UNGUIDED,
) -> tuple[list[PrefixView], Tensor, float]:
    """One prefill for all views of a prompt, the logits [1, V] after it, and its seconds."""
    device = model.geometry.device
    tokens_1S = torch.tensor([prompt.tokens], device=device)
    wanted = [(len(prompt.tokens), view) for view in views]
    (kept, logits_1V), seconds = clocked(lambda: model.prefill(tokens_1S, wanted, guides), device, rehearse)
    return kept, logits_1V, seconds


def clocked(work: Callable[[], T], device: torch.device, rehearse: bool) -> tuple[T, float]:
    """What some work gives, and its seconds.

    With `rehearse` it is done twice and the second is timed: the first prefill of a length may compile
    kernels, and finds memory and caches cold, which decoding does not.
    """
    if rehearse:
        work()
    began = clock(device)
    done = work()
    return done, clock(device) - began


class Bench:
    """The target, prefilled with a few prompts, which are decoded together again and again.

    `self_views` are sparse views of the target itself, for self-speculation: one prefill gives them beside
    its whole cache, and `self_prefill_s` is the time that they add to it. Where a drafter is to be `guided`,
    `guides` are those of the prompts, and `guide_s` the time that they add. `new_tokens`, by default the
    limit of the prompts, sizes the caches, so that shorter runs can have the shapes of longer ones.
    `rehearse` is for prefills whose seconds are to be compared; `refreshed` for drafters whose entries are
    chosen again.
    """

    def __init__(
        self,
        runners: Runners,
        target: DecodeModel,
        prompts: Sequence[Prompt],
        most_drafts: int,
        self_views: Sequence[View] = (),
        new_tokens: int | None = None,
        rehearse: bool = False,
        guided: bool = False,
        refreshed: bool = False,
    ) -> None:
        self.rehearse = rehearse
        self.prompts, self.limit = list(prompts), prompts[0].max_new_tokens
        if any(prompt.max_new_tokens != self.limit for prompt in prompts):
            raise ValueError("prompts that are decoded together need equal max_new_tokens")
        self.runners, self.room = runners, (new_tokens or self.limit) + most_drafts
        longest = max(len(prompt.tokens) for prompt in prompts)
        runners.begin(len(self.prompts), slots_for(longest), self.room)
        self.target = runners.get("target", target, len(self.prompts), slots_for(longest), self.room)
        if refreshed:
            self.target.cache.note_queries()
        self.device = target.geometry.device
        self.logits: list[Tensor] = []
        self.prefill_s: list[float] = []
        self.kv_bytes: list[int] = []
        self.self_kept: list[dict[View, PrefixView]] = []
        self.self_prefill_s: list[float] = []
        self.guides: list[Guides] = [UNGUIDED] * len(self.prompts)
        self.guide_s = [0.0] * len(self.prompts)
        for row, prompt in enumerate(self.prompts):
            (view,), logits_1V, seconds = timed_prefill(target, prompt, [FULL], rehearse)
            if guided:
                self.guides[row], self.guide_s[row] = clocked(view.guiding, self.device, rehearse)
            if self_views:
                (_, *sparse), _, both_s = timed_prefill(target, prompt, [FULL, *self_views], rehearse)
                self.self_kept.append(dict(zip(self_views, sparse, strict=True)))
                self.self_prefill_s.append(max(both_s - seconds, 0.0))
            self.target.cache.load_row(row, view)  # a copy: the view is freed after the next prefill
            self.logits.append(logits_1V)
            self.prefill_s.append(seconds)
            self.kv_bytes.append(view.num_bytes)

    @property
    def shape(self) -> tuple[object, ...]:
        """Prompts of an equal shape need no warm-up runs of their own."""
        first, cache = self.prompts[0], self.target.cache
        return (first.dataset, first.context, cache.rows, cache.capacity, cache.room)

    def drafter(self, model: DecodeModel, views: Sequence[PrefixView], beyond: int = 0) -> Runner:
        """A drafter behind one view of each prompt; a later call for an equal shape reuses its cache.

        Args:
            beyond: tokens that it may read beyond the proposals of a round.
        """
        capacity = capacity_of(views[0].view, max(view.kept for view in views))
        runner = self.runners.get("drafter", model, len(views), capacity, self.room + beyond)
        for row, view in enumerate(views):
            runner.cache.load_row(row, view)
        return runner

    def start(self, chance: Chance) -> tuple[list[int], Sampler]:
        """The tokens that the prefills give, and the sampler that goes on from there."""
        sampler = chance.sampler([prompt.prompt_id for prompt in self.prompts], self.device)
        return sampler.choose(torch.cat(self.logits)).tolist(), sampler

    def autoregressive(self, chance: Chance, eos: frozenset[int]) -> Timed:
        def run(firsts: list[int], sampler: Sampler) -> list[list[int | None]]:
            return list(autoregressive(self.target, firsts, self.limit, eos, sampler))

        firsts, steps, seconds, peak = self.timed(run, chance)
        tokens = [
            [first, *(token for token in column if token is not None)]
            for first, *column in zip(firsts, *steps, strict=True)
        ]
        return Timed(tokens, [[] for _ in firsts], seconds, peak)

    def speculative(self, source: DraftSource, gamma: int, chance: Chance, eos: frozenset[int]) -> Timed:
        def run(firsts: list[int], sampler: Sampler) -> list[list[Round | None]]:
            return list(speculate(self.target, source, firsts, gamma, self.limit, eos, sampler))

        firsts, steps, seconds, peak = self.timed(run, chance)
        rounds = [[round_ for round_ in column if round_ is not None] for column in zip(*steps, strict=True)]
        rounds = rounds or [[] for _ in firsts]
        tokens = [
            [first, *(token for round_ in row for token in round_.tokens)]
            for first, row in zip(firsts, rounds, strict=True)
        ]
        return Timed(tokens, rounds, seconds, peak)

    def timed(
        self, run: Callable[[list[int], Sampler], list[T]], chance: Chance
    ) -> tuple[list[int], list[T], float, int]:
        """First tokens, the steps of a run, its seconds and its peak memory.

        A run in which something had to be compiled does not count, and is done again.
        """
        while True:
            compiled = self.runners.compile_s
            firsts, sampler = self.start(chance)
            began = self.begin()
            steps = run(firsts, sampler)
            seconds, peak = self.end(began)
            if self.runners.compile_s == compiled:
                return firsts, steps, seconds, peak

    @torch.no_grad()
    def divergence(self, row: int, plain: Sequence[int], other: Sequence[int]) -> tuple[float, float]:
        """Where two greedy runs of a prompt part: the target's top-2 logit gap, and the noise of its logits.

        The noise is the largest difference, up to there, between logits of tokens read one by one (as
        autoregressive decoding does) and in one pass (as verification does).
        """
        same = next(i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b)
        tokens_BT = torch.tensor(plain[:same], device=self.device).repeat(len(self.prompts), 1)
        model, cache, zero_B = (
            self.target.model,
            self.target.cache,
            torch.zeros_like(self.target.cache.kept_B),
        )
        singly = [
            model.logits(model.hidden(tokens_BT[:, at : at + 1], zero_B + at, cache))[row, 0].float()
            for at in range(same)
        ]
        at_once_TV = model.logits(model.hidden(tokens_BT, zero_B, cache))[row].float()
        best = singly[-1].topk(2).values
        return float(best[0] - best[1]), float((torch.stack(singly) - at_once_TV).abs().max())

    def departure(self, row: int, plain: Sequence[int], lossy: Sequence[int]) -> Departure:
        """How far a text that a lossy rule gave of a prompt is from the target's own, `plain`."""
        return Departure.of(self.scored(row, lossy), self.scored(row, plain))

    @torch.no_grad()
    def scored(self, row: int, tokens: Sequence[int]) -> Scored:
        """A prompt's text of at least two tokens, read by the target in one pass; it overwrites the cache."""
        cache, model = self.target.cache, self.target.model
        read_BT = torch.tensor(tokens[:-1], device=self.device).repeat(len(self.prompts), 1)
        hidden_BTC = model.hidden(read_BT, torch.zeros_like(cache.kept_B), cache)
        log_p_TV = model.logits(hidden_BTC[row : row + 1])[0].float().log_softmax(-1)
        given_T1 = torch.tensor(tokens[1:], device=self.device).unsqueeze(1)
        log_probs_T = log_p_TV.gather(1, given_T1).squeeze(1)
        return Scored(tokens[1:], log_p_TV.argmax(-1).tolist(), log_probs_T.tolist())

    def begin(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return clock(self.device)

    def end(self, began: float) -> tuple[float, int]:
        """Seconds since `began`, and peak memory."""
        seconds = clock(self.device) - began
        if self.device.type == "cuda":
            return seconds, torch.cuda.max_memory_allocated(self.device)
        return seconds, peak_bytes()
