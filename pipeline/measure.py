"""Wall clock of one prompt: autoregressive decoding and speculation from the same caches, run after run."""

from __future__ import annotations

import resource
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.decoding import Round, Sampler, autoregressive, fold, next_logits, speculate
from pipeline.kv import FULL, PrefixView, View, ViewCache, read_prefix
from pipeline.models import stop_tokens
from pipeline.rows import Prompt


@dataclass(frozen=True)
class Timed:
    """One timed run; `tokens` begins with the prefill's. Peak memory is the process's on a CPU."""

    tokens: list[int]
    rounds: list[Round]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Chance:
    """How a run samples. Runs of one prompt and chance draw the same numbers, other prompts draw others."""

    temperature: float
    seed: int


def clock(device: torch.device) -> float:
    """Seconds, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed_prefill(
    model: PreTrainedModel, prompt: Prompt, views: Sequence[View]
) -> tuple[list[PrefixView], Tensor, float]:
    """One prefill for all views of a prompt, the logits [1, V] after it, and its seconds."""
    tokens_1S = torch.tensor([prompt.tokens], device=model.device)
    began = clock(model.device)
    kept, logits_1V = read_prefix(model, tokens_1S, [(len(prompt.tokens), view) for view in views])
    return kept, logits_1V, clock(model.device) - began


class Bench:
    """The target, prefilled once with one prompt, and decoded from again and again."""

    def __init__(self, target: PreTrainedModel, prompt: Prompt, most_drafts: int) -> None:
        self.target, self.prompt, self.device = target, prompt, target.device
        self.room = prompt.max_new_tokens + most_drafts
        views, self.logits_1V, self.prefill_s = timed_prefill(target, prompt, [FULL])
        self.kv_bytes = views[0].num_bytes
        self.cache = ViewCache(views, self.room)  # copies: the views go when this returns
        self.eos = stop_tokens(target)

    def start(self, chance: Chance) -> tuple[int, Sampler]:
        """The token that the prefill gives, and the sampler that goes on from there."""
        seed = fold(chance.seed, zlib.crc32(self.prompt.prompt_id.encode()))
        sampler = Sampler.seeded(chance.temperature, seed, self.device)
        return int(sampler.choose(self.logits_1V)[0]), sampler

    def autoregressive(self, chance: Chance) -> Timed:
        first, sampler = self.start(chance)
        began = self.begin([self.cache])
        tokens = list(
            autoregressive(
                self.target,
                self.cache,
                len(self.prompt.tokens),
                first,
                self.prompt.max_new_tokens,
                self.eos,
                sampler,
            )
        )
        return self.end(began, [first, *tokens], [])

    def speculative(self, drafter: PreTrainedModel, cache: ViewCache, gamma: int, chance: Chance) -> Timed:
        first, sampler = self.start(chance)
        began = self.begin([self.cache, cache])
        rounds = list(
            speculate(
                self.target,
                drafter,
                self.cache,
                cache,
                len(self.prompt.tokens),
                first,
                gamma,
                self.prompt.max_new_tokens,
                self.eos,
                sampler,
            )
        )
        tokens = [first, *(token for one in rounds for token in one.tokens)]
        return self.end(began, tokens, rounds)

    @torch.inference_mode()
    def divergence(self, plain: Sequence[int], other: Sequence[int]) -> tuple[float, float]:
        """Where two greedy runs part: the target's top-2 logit gap, and the noise of its logits.

        The noise is the largest difference, up to there, between logits of tokens read one by one (as
        autoregressive decoding does) and in one pass (as verification does).
        """
        same = next(i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b)
        tokens, start = list(plain[:same]), len(self.prompt.tokens)
        self.cache.rollback(self.cache.appended)
        singly = [next_logits(self.target, self.cache, [t], start + i)[0] for i, t in enumerate(tokens)]
        self.cache.rollback(self.cache.appended)
        at_once_TV = next_logits(self.target, self.cache, tokens, start)
        singly_TV = torch.stack(singly).float()
        best = singly_TV[-1].topk(2).values
        return float(best[0] - best[1]), float((singly_TV - at_once_TV.float()).abs().max())

    def begin(self, caches: Sequence[ViewCache]) -> float:
        """Forget what the last run appended, one that broke off included, and start the clock."""
        for cache in caches:
            cache.rollback(cache.appended)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return clock(self.device)

    def end(self, began: float, tokens: list[int], rounds: list[Round]) -> Timed:
        seconds = clock(self.device) - began
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Timed(tokens, rounds, seconds, peak)
