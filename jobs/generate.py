"""`budgetdraft generate`: continue one prompt with a trained drafter, streamed, and say what it was worth."""

from __future__ import annotations

import time
from typing import Literal

import torch
from transformers import AutoTokenizer

from jobs.pipeline import completed
from pipeline.config import Config
from pipeline.decoding import Sampler, autoregressive, speculate
from pipeline.errors import BadData
from pipeline.kv import FULL, ViewCache, read_prefix, view_of
from pipeline.models import load_model, pick_device, stop_tokens


def generate(
    config: Config,
    prompt: str,
    drafter: str | None,
    policy: str,
    budget: int | Literal["full"],
    gamma: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Stream a continuation to stdout, then acceptance, τ and the speed against autoregressive decoding.

    The target decodes the prompt twice: speculatively, which is what is streamed, and autoregressively for
    the comparison.

    Raises:
        BadData: if the prompt is empty or the drafter's name unknown.
    """
    trained = completed(config)
    name = drafter or config.train.variants[-1].name
    if name not in trained.drafters:
        raise BadData(f"there is no drafter {name!r}; there are {', '.join(trained.drafters)}")
    tokenizer = AutoTokenizer.from_pretrained(trained.tokenizer)
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise BadData("the prompt is empty")
    device = pick_device(config.run.device)
    target = load_model(trained.target, len(tokenizer), device)
    small = load_model(trained.drafters[name], len(tokenizer), device)

    tokens_1S, eos = torch.tensor([tokens], device=device), stop_tokens(target)
    target_views, logits_1V = read_prefix(target, tokens_1S, [(len(tokens), FULL)])
    views, _ = read_prefix(small, tokens_1S, [(len(tokens), view_of(policy, budget))])
    first = int(Sampler.seeded(temperature, seed, device).choose(logits_1V)[0])
    room = max_new_tokens + gamma
    target_cache, cache = ViewCache(target_views, room), ViewCache(views, room)

    # A token may be part of a character: print what the whole text gained, not each token's own text.
    written, shown = [first], ""
    began = time.perf_counter()
    proposed = accepted = rounds = 0
    for one in speculate(
        target, small, target_cache, cache, len(tokens), first, gamma, max_new_tokens, eos,
        Sampler.seeded(temperature, seed, device),
    ):  # fmt: skip
        written += one.tokens
        proposed, accepted, rounds = proposed + one.proposed, accepted + one.accepted, rounds + 1
        text = tokenizer.decode(written, skip_special_tokens=True)
        print(text[len(shown) :], end="", flush=True)
        shown = text
    seconds = time.perf_counter() - began
    print()

    target_cache.rollback(target_cache.appended)
    began = time.perf_counter()
    plain = [
        first,
        *autoregressive(
            target, target_cache, len(tokens), first, max_new_tokens, eos,
            Sampler.seeded(temperature, seed, device),
        ),
    ]  # fmt: skip
    ar_seconds = time.perf_counter() - began
    if rounds == 0:
        print("[the target ended the text at once: nothing was drafted]")
        return
    count, ar_count = len(written) - 1, len(plain) - 1
    print(
        f"[{name}, {policy} budget {budget}, γ {gamma}: acceptance {accepted / max(proposed, 1):.3f}, "
        f"τ {count / rounds:.2f}, {count / seconds:.1f} tokens/s, "
        f"autoregressive {ar_count / ar_seconds:.1f}, "
        f"speedup {count / seconds / (ar_count / ar_seconds):.2f}"
        + (f", {'same' if written == plain else 'DIFFERENT'} tokens]" if temperature == 0 else "]")
    )
