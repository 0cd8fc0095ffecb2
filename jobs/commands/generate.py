"""`budgetdraft generate`: continue one prompt with a trained drafter, streamed, and say what it was worth."""

from __future__ import annotations

import logging
from typing import Literal

from jobs.stages.pipeline import completed
from kernels import dispatch
from pipeline.axes import AcceptanceRule
from pipeline.config.schema import Config
from pipeline.decode.dropmatch import DropMatch
from pipeline.decode.sampling import Chance
from pipeline.errors import BadData, ConfigError
from pipeline.kv.policies import GUIDED
from pipeline.kv.views import view_of
from pipeline.metrics import Counts
from pipeline.results.lossy import WARNING, departure_text
from pipeline.serving.pair import load_pair

log = logging.getLogger(__name__)

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
    rule: AcceptanceRule = "exact",
) -> None:
    """Stream a continuation to stdout, then acceptance, τ and the speed against autoregressive decoding.

    The prompt is decoded again without output, both ways, and timed. By a lossy rule, which is greedy, a last
    line says that the text is not the target's, and how far from it.

    Raises:
        BadData: if the prompt is empty or the drafter's name unknown.
    """
    try:
        view = view_of(policy, budget, config.sweep.sinks)
    except ValueError as error:
        raise ConfigError(f"sweep.sinks: {error}") from error
    trained = completed(config)
    name = drafter or config.train.drafters[-1].name
    if name not in trained.drafters:
        raise BadData(f"there is no drafter {name!r}; there are {', '.join(trained.drafters)}")
    dispatch.choose(config.run.kernels)
    decode = config.decode
    pair = load_pair(
        trained.target,
        trained.drafters[name],
        trained.tokenizer,
        config.run.device,
        decode.compile,
        decode.prefill_chunk,
    )
    if config.sweep.refresh and policy == GUIDED:
        log.warning(
            "sweep.refresh (%d): here entries are chosen once, and fewer may be accepted than in the sweep",
            config.sweep.refresh,
        )
    reading = pair.read([prompt], view, gamma, max_new_tokens, threshold)
    masks = None
    if rule == "dropmatch":
        masks = DropMatch(config.sweep.dropmatch.masks, config.sweep.dropmatch.dropout, seed)
    bench, chance = reading.bench, Chance(temperature, seed, masks)

    # Streamed first, which also warms up; the timed runs print nothing. A token may hold part of a
    # character, so the whole text is decoded, and its new end printed without an unfinished character.
    shown, text = 0, ""
    for (written,) in reading.stream(chance):
        text = pair.tokenizer.decode(written, skip_special_tokens=True)
        whole = text.rstrip(UNFINISHED)
        print(whole[shown:], end="", flush=True)
        shown = len(whole)
    print(text[shown:])

    bench.autoregressive(chance, pair.eos)
    plain = bench.autoregressive(chance, pair.eos)
    timed = bench.speculative(reading.source, gamma, chance, pair.eos)
    rounds = timed.rounds[0]
    if not rounds:
        print("[the target ended the text at once: nothing was drafted]")
        return
    counts = Counts.of(rounds, gamma)
    speed, ar_speed = counts.num_tokens / timed.seconds, (len(plain.tokens[0]) - 1) / plain.seconds
    print(
        f"[{name}, {policy} budget {budget}, γ {gamma}: acceptance "
        f"{'none proposed' if counts.acceptance is None else format(counts.acceptance, '.3f')}, "
        f"τ {counts.tau:.2f}, {speed:.1f} tokens/s, "
        f"autoregressive {ar_speed:.1f}, speedup {speed / ar_speed:.2f}"
        + (
            f", {'same' if timed.tokens == plain.tokens else 'DIFFERENT'} tokens]"
            if temperature == 0
            else "]"
        )
    )
    if masks:
        departure = bench.departure(0, plain.tokens[0], timed.tokens[0])
        print(f"[{rule}, {WARNING}: {departure_text(departure)}]")
