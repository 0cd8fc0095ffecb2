"""`budgetdraft generate`: continue one prompt with a trained drafter, streamed, and say what it was worth."""

from __future__ import annotations

from typing import Literal

from transformers import AutoTokenizer

from jobs.pipeline import completed
from kernels import dispatch
from pipeline import replay
from pipeline.config import Config
from pipeline.decoding import speculate
from pipeline.drafting import ModelDrafts
from pipeline.errors import BadData
from pipeline.kv import view_of
from pipeline.lean import decode_model
from pipeline.measure import Bench, Chance, Sides, timed_prefill
from pipeline.models import load_model, pick_device, stop_tokens
from pipeline.rows import Prompt

UNFINISHED = "\ufffd"  # what decoding shows for the first bytes of a character


def generate(
    config: Config,
    prompt: str,
    drafter: str | None,
    policy: str,
    budget: int | Literal["full"],
    gamma: int,
    threshold: float,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Stream a continuation to stdout, then acceptance, τ and the speed against autoregressive decoding.

    The prompt is decoded again without output, both ways, and timed.

    Raises:
        BadData: if the prompt is empty or the drafter's name unknown.
    """
    trained = completed(config)
    name = drafter or config.train.drafters[-1].name
    if name not in trained.drafters:
        raise BadData(f"there is no drafter {name!r}; there are {', '.join(trained.drafters)}")
    tokenizer = AutoTokenizer.from_pretrained(trained.tokenizer)
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise BadData("the prompt is empty")
    device = pick_device(config.run.device)
    dispatch.choose(config.run.kernels)
    target = load_model(trained.target, len(tokenizer), device)
    small = load_model(trained.drafters[name], len(tokenizer), device)
    fast, fast_small = (decode_model(model, config.decode.prefill_chunk) for model in (target, small))

    # The prompt of a bench: the same code and clock as in the sweep.
    asked = Prompt(
        prompt_id="generate",
        document_id="generate",
        dataset="generate",
        context="generate",
        split="test",
        tokens=tokens,
        max_new_tokens=max_new_tokens,
    )
    bench, chance = Bench(Sides(config.decode.compile), fast, [asked], gamma), Chance(temperature, seed)
    views, _, _ = timed_prefill(fast_small, asked, [view_of(policy, budget)])
    source = ModelDrafts(bench.drafter(fast_small, views), threshold)
    eos = stop_tokens(target)

    # Streamed first, which also warms up; the timed runs print nothing. A token may hold part of a
    # character: what the whole text has gained is printed, but for an unfinished character at its end.
    firsts, sampler = bench.start(chance)
    written, shown = list(firsts), 0
    for (one,) in speculate(bench.target, source, firsts, gamma, max_new_tokens, eos, sampler):
        assert one is not None, "the only row is at work until the last round"
        written += one.tokens
        text = tokenizer.decode(written, skip_special_tokens=True).rstrip(UNFINISHED)
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print(tokenizer.decode(written, skip_special_tokens=True)[shown:])

    bench.autoregressive(chance, eos)
    plain, timed = (
        bench.autoregressive(chance, eos),
        bench.speculative(source, gamma, chance, eos),
    )
    rounds = timed.rounds[0]
    if not rounds:
        print("[the target ended the text at once: nothing was drafted]")
        return
    counts = replay.count([(r.proposed, r.accepted, len(r.tokens)) for r in rounds], gamma)
    speed, ar_speed = counts.num_tokens / timed.seconds, (len(plain.tokens[0]) - 1) / plain.seconds
    print(
        f"[{name}, {policy} budget {budget}, γ {gamma}: acceptance "
        f"{counts.num_accepted / max(counts.num_proposed or 0, 1):.3f}, "
        f"τ {counts.num_tokens / counts.num_rounds:.2f}, {speed:.1f} tokens/s, "
        f"autoregressive {ar_speed:.1f}, speedup {speed / ar_speed:.2f}"
        + (
            f", {'same' if timed.tokens == plain.tokens else 'DIFFERENT'} tokens]"
            if temperature == 0
            else "]"
        )
    )
