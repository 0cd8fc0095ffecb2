"""The arithmetic of a run, and the hours that it takes at a given or a measured rate."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch

from pipeline.config.schema import Config, ScratchModel
from pipeline.decode.loop import autoregressive
from pipeline.decode.model import decode_model
from pipeline.decode.sources import GREEDILY
from pipeline.decode.steps import Side
from pipeline.kv.slot_cache import slots_for
from pipeline.models.load import build_scratch
from pipeline.plan.shapes import Shape
from pipeline.plan.sweep_counts import (
    draft_sources,
    longest,
    measured_again,
    picks_of,
    pointed_at,
    role_of,
    texts,
)
from pipeline.sweep.grid import view_cells
from pipeline.sweep.predict import FASTEST_MEASURED, MEASURED_AGAIN, Place

TIMED_TOKENS = 2048  # of the sequence that a scratch model is timed on
TIMED_RUNS, TIMED_STEPS = 3, 8
MEASURING = "sweep measure"  # the stage, as in `pipeline.sweep_costs.measure_memory`
Rates = dict[tuple[str, bool], float]  # FLOP/s by the model's role, and whether it trains


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage by the model that does them, forward alone or with backward (three times as many)."""

    stage: str
    role: str
    training: bool
    flops: float


def work(
    config: Config, shapes: Mapping[str, Shape], labelled: int, prompts: Mapping[Place, int]
) -> list[Work]:
    """All work up to replay, validation aside; of what is measured, `prefills` has the reading.

    Args:
        labelled: sequences that the target labels.
        prompts: of the test split.
    """
    data, train, length = config.data, config.train, config.data.sequence_tokens
    target, drafter = shapes["target"], shapes["drafter"]
    done: list[Work] = []
    for role, spec in (("target", config.target), ("drafter", config.drafter)):
        if isinstance(spec, ScratchModel):
            piece = spec.pretrain.sequence_tokens or length
            tokens = spec.pretrain.steps * spec.pretrain.batch_sequences * piece
            flops = 3 * shapes[role].forward_flops(tokens, piece / 2)
            done.append(Work(f"pretrain {role}", role, True, flops))

    greedy, sampled = texts(config.sweep, config.sweep.temperatures)
    tokens_of = {context.name: context.tokens for context in data.contexts}
    read = [(tokens_of[place.context], count) for place, count in prompts.items()]
    flops = target.forward_flops(labelled * length * (1 + config.labels.on_policy_fraction), length / 2)
    for tokens, count in read:
        flops += target.forward_flops(count * (1 + sampled) * (tokens + data.max_new_tokens), tokens / 2)
    done.append(Work("teach", "target", False, flops))

    for variant in train.drafters:
        sequences = (train.steps if variant.steps is None else variant.steps) * train.batch_sequences
        attended = [length / 2] if variant.full_weight else []
        if variant.sparse_weight and variant.budgets:
            attended += [float(max(variant.budgets))] * min(variant.num_views, len(variant.budgets))
        tokens = sequences * train.windows * train.window_tokens
        windows = sum(3 * drafter.forward_flops(tokens, entries) for entries in attended)
        prefill = drafter.forward_flops(sequences * length, length / 2)
        done += [Work("train", "drafter", False, prefill), Work("train", "drafter", True, windows)]

    for source in draft_sources(config) if config.sweep.mode != "measure" else ():
        if reader := role_of(source):
            views = len(view_cells(config.sweep, source)) * (greedy + sampled)
            flops = sum(
                count * shapes[reader].forward_flops(tokens + views * data.max_new_tokens, tokens / 2)
                for tokens, count in read
            )
            done.append(Work("sweep replay", reader, False, flops))
    return done


def prefills(config: Config, shapes: Mapping[str, Shape], prompts: Mapping[Place, int]) -> list[Work]:
    """The timed prompts: read by the target, by each drafter, and once more by a target that drafts; each
    time twice, as the second is timed.

    Where the fastest cells are measured again, by the target each time, and by as many of the largest
    sources as there can be cells.
    """
    tokens_of = {context.name: context.tokens for context in config.data.contexts}
    done = []
    for place, count in prompts.items():
        tokens, timed = tokens_of[place.context], min(count, config.sweep.measure.prompts)
        picks = picks_of(config, place)
        _, added = pointed_at(config, place, set(picks)) if config.sweep.predicts else (0, [])
        timed_ones = {pick.drafter for pick in picks}.union(added)
        roles = [role_of(source) for source in draft_sources(config) if source.name in timed_ones]
        each = {role: shape.forward_flops(timed * tokens, tokens / 2) for role, shape in shapes.items()}
        readers = sorted(filter(None, roles), key=lambda role: -each[role])
        reading = ["target", *readers]
        if measured_again(config.sweep):
            reading += len(MEASURED_AGAIN) * ["target", *readers[:FASTEST_MEASURED]]
        done += [Work(MEASURING, role, False, 2 * each[role]) for role in reading]
    return done


def hours(done: Iterable[Work], rates: Rates) -> dict[str, float]:
    """Device-hours by stage."""
    total: dict[str, float] = defaultdict(float)
    for part in done:
        total[part.stage] += part.flops / rates[part.role, part.training] / 3600
    return dict(total)


def rates_of(
    config: Config, shapes: Mapping[str, Shape], device: str, tflops: float | None
) -> tuple[Rates | None, str]:
    """The rates of one process and where they come from; None where they cannot be known.

    Args:
        tflops: as given by the user, for everything.
    """
    if tflops:
        given = dict.fromkeys(product(shapes, (False, True)), tflops * 1e12)
        return given, f"estimate: FLOPs at the given {tflops:g} TFLOP/s"
    specs = {"target": config.target, "drafter": config.drafter}
    scratch = {role: spec for role, spec in specs.items() if isinstance(spec, ScratchModel)}
    if len(scratch) < len(specs) or (device == "cuda" and not torch.cuda.is_available()):
        return None, "not known: give --tflops X, the effective TFLOP/s of the device"
    length = min(config.data.sequence_tokens, TIMED_TOKENS)
    rates: Rates = {}
    for role, spec in scratch.items():
        flops = shapes[role].forward_flops(length, length / 2)
        seconds = timed_step(spec, shapes[role].vocab, length, device, config.train.dtype == "bfloat16")
        for training, least in seconds.items():
            threads = threads_of(config, device, "train" if training else "teach")
            rates[role, training] = threads * flops * (3 if training else 1) / least
    measured = ", ".join(
        f"{role} {'training' if training else 'forward'} {rate / 1e12:.3g} TFLOP/s"
        for (role, training), rate in rates.items()
    )
    return (
        rates,
        f"estimate: FLOPs at rates measured here, of one thread times those of a process: {measured}",
    )


def threads_of(config: Config, device: str, work: Literal["teach", "train", "measure"]) -> int:
    """Threads of a process that works on a CPU; what is timed on one of them is taken to share out evenly."""
    own = config.run.needs(work).cpus or 0 if config.run.executor == "ray" else torch.get_num_threads()
    return max(1, int(own)) if device == "cpu" else 1


class Vocabulary:
    """Stands in for a tokenizer of so many entries where a model is built to be timed."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __init__(self, entries: int) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return self.entries


def timed_step(
    spec: ScratchModel, vocab: int, tokens: int, device: str, bfloat16: bool = False
) -> dict[bool, float]:
    """Seconds of one sequence forward alone (False) and of a whole training step (True), the best run.

    On a CPU they are seconds of one thread's own time: what else runs on the machine does not count.
    """
    entries: Any = Vocabulary(vocab)
    model = build_scratch(spec, entries, 0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens_1S = torch.zeros(1, tokens, dtype=torch.long, device=device)
    clock = time.process_time if device == "cpu" else time.perf_counter

    def step(training: bool) -> None:
        half = torch.autocast(device, torch.bfloat16, enabled=bfloat16 and training)
        with torch.set_grad_enabled(training), half:
            logits = model(input_ids=tokens_1S, use_cache=False).logits
        if training:
            logits.float().logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = {False: math.inf, True: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for training in [False, True] * TIMED_RUNS:
        began = clock()
        step(training)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[training] = min(seconds[training], clock() - began)
    torch.set_num_threads(threads)
    return seconds


def step_of(config: Config, vocab: int, device: str, step_ms: float | None) -> tuple[float | None, str]:
    """Seconds of one autoregressive step of the target, and where they come from; None where not known.

    Args:
        vocab: entries of the target's vocabulary.
        step_ms: as given by the user.
    """
    if step_ms:
        return step_ms / 1e3, f"the given {step_ms:g} ms"
    spec = config.target
    if not isinstance(spec, ScratchModel) or (device == "cuda" and not torch.cuda.is_available()):
        return None, "not known"
    threads = threads_of(config, device, "measure")
    seconds = timed_decoding(spec, vocab, longest(config), device, threads)
    return seconds, f"{1e3 * seconds:.3g} ms measured here, of a process with {threads} threads"


def timed_decoding(spec: ScratchModel, vocab: int, prefix: int, device: str, threads: int) -> float:
    """Seconds of decoding one token behind a prefix of so many, uncompiled, the best step.

    With so many threads: so small a step is not shared out evenly.
    """
    entries: Any = Vocabulary(vocab)
    model = decode_model(build_scratch(spec, entries, 0).to(device, getattr(torch, spec.dtype)))
    side = Side(model, 1, slots_for(prefix), TIMED_STEPS, "none")
    side.cache.kept_B.fill_(prefix)
    sampler = GREEDILY.sampler(["timed"], torch.device(device))
    least, before = math.inf, torch.get_num_threads()
    torch.set_num_threads(threads)
    for _ in range(TIMED_RUNS):
        began = time.perf_counter()
        for _ in autoregressive(side, [0], TIMED_STEPS, frozenset(), sampler):
            ended = time.perf_counter()
            least, began = min(least, ended - began), ended
    torch.set_num_threads(before)
    return least
