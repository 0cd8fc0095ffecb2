"""FLOP/s and step times of this machine, timed on models of a config's shape."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from itertools import product

import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer

from pipeline.config.models import Role, ScratchModel
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.decode.loop import autoregressive
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import GREEDILY
from pipeline.kv.slot_cache import slots_for
from pipeline.models.build import build_random
from pipeline.models.shape import Shape
from pipeline.plan.flops import Rates

TIMED_TOKENS = 2048  # of the sequence that a scratch model is timed on
TIMED_RUNS, TIMED_STEPS = 3, 8


def rates_of(
    config: Config, shapes: Mapping[Role, Shape], device: str, tflops: float | None
) -> tuple[Rates | None, str]:
    """The rates of one process and where they come from; None where they cannot be known.

    Args:
        tflops: as given by the user, for everything.
    """
    if tflops:
        given = dict.fromkeys(product(shapes, (False, True)), tflops * 1e12)
        return given, f"estimate: FLOPs at the given {tflops:g} TFLOP/s"
    specs = can_be_timed(config, device)
    if len(specs) < len(shapes):
        return None, "not known: give --tflops X, the effective TFLOP/s of the device"
    length, rates, measured = min(config.data.sequence_tokens, TIMED_TOKENS), Rates(), []
    for role, spec in specs.items():
        flops = shapes[role].forward_flops(length, length / 2)
        seconds = timed_step(spec, shapes[role].vocab, length, device, config.train.dtype == "bfloat16")
        for training, least in seconds.items():
            threads = threads_of(config, device, "train" if training else "teach")
            rates[role, training] = rate = threads * flops * (3 if training else 1) / least
            measured.append(f"{role} {'training' if training else 'forward'} {rate / 1e12:.3g} TFLOP/s")
    how = "estimate: FLOPs at rates measured here, of one thread times those of a process: "
    return rates, how + ", ".join(measured)


def can_be_timed(config: Config, device: str) -> dict[Role, ScratchModel]:
    """The config's models that can be built here without their weights."""
    return config.scratch if device == "cpu" or torch.cuda.is_available() else {}


def threads_of(config: Config, device: str, work: Work) -> int:
    """Threads of a process on a CPU, among which the work that is timed on one is taken to divide evenly."""
    threads = config.run.needs(work).threads if config.run.executor == "ray" else torch.get_num_threads()
    return threads if device == "cpu" else 1


def timed_step(
    spec: ScratchModel, vocab: int, tokens: int, device: str, bfloat16: bool = False
) -> dict[bool, float]:
    """Seconds of one sequence forward alone (False) and of a whole training step (True).

    On a CPU they are seconds of one thread's own time: what else runs on the machine does not count.
    """
    model = build_random(spec, vocab).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens_1S = torch.zeros(1, tokens, dtype=torch.long, device=device)

    def step(training: bool) -> None:
        half = torch.autocast(device, torch.bfloat16, enabled=bfloat16 and training)
        with torch.set_grad_enabled(training), half:
            logits = model(input_ids=tokens_1S, use_cache=False).logits
        if training:
            logits.float().logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    clock = time.process_time if device == "cpu" else timer
    return {
        training: Timer("step()", timer=clock, globals={"step": partial(step, training)})
        .timeit(TIMED_RUNS)
        .mean
        for training in (False, True)
    }


def step_of(config: Config, vocab: int, device: str, step_ms: float | None) -> tuple[float | None, str]:
    """Seconds of one autoregressive step of the target, and where they come from; None where not known.

    Args:
        vocab: entries of the target's vocabulary.
        step_ms: as given by the user.
    """
    if step_ms:
        return step_ms / 1e3, f"the given {step_ms:g} ms"
    spec, threads = can_be_timed(config, device).get("target"), threads_of(config, device, "measure")
    if spec is None:
        return None, "not known"
    seconds = timed_decoding(spec, vocab, max(config.data.context_tokens.values()), device, threads)
    return seconds, f"{1e3 * seconds:.3g} ms measured here, of a process with {threads} threads"


def timed_decoding(spec: ScratchModel, vocab: int, prefix: int, device: str, threads: int) -> float:
    """Seconds of decoding one token behind a prefix of so many, uncompiled, the best step.

    Timed with `threads` threads, as so small a step does not divide evenly among them.
    """
    model = decode_model(build_random(spec, vocab).to(device, getattr(torch, spec.dtype)))
    tokens = 1 + 3 * TIMED_STEPS  # before each timed step are two to warm up
    runner = Runner(model, 1, slots_for(prefix), tokens, "none")
    runner.cache.kept_B.fill_(prefix)
    sampler = GREEDILY.sampler(["timed"], torch.device(device))
    steps = autoregressive(runner, [0], tokens, frozenset(), sampler)
    timed = Timer("next(steps)", globals={"steps": steps}, num_threads=threads)
    return min(timed.timeit(1).mean for _ in range(TIMED_STEPS))
