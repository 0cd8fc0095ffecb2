"""`budgetdraft plan`: what a config will cost, and whether it fits, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jobs.plan.amounts import GB, Amount, disk_problems, of_data, of_sweep, on_disk
from jobs.plan.facts import Facts, beyond_positions, known
from jobs.plan.memory import device_memory, device_of, memory, memory_problems
from jobs.stages.pipeline import settled
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.plan.flops import MEASURING, Rates, hours, prefills, work
from pipeline.plan.rates import rates_of, step_of
from pipeline.plan.shapes import Memory, Shape
from pipeline.plan.sweep_counts import count_sweep
from pipeline.sweep.picks import unranked


def plan(
    config: Config,
    as_json: bool,
    memory_gb: float | None,
    tflops: float | None,
    step_ms: float | None = None,
) -> None:
    """Print what every stage takes.

    Args:
        memory_gb: memory of the device in 10^9 bytes; default: that of `run.device` here.
        tflops: effective TFLOP/s of the device; default: measured, where both models are scratch models.
        step_ms: milliseconds of an autoregressive step of the target behind the longest context; default:
            measured, where it is a scratch model.

    Raises:
        BadData: if an input is missing, a model's config is not on disk, or something does not fit; the text
            names the field.
    """
    config = settled(config)
    device = device_of(config)  # first: reading documents leaves memory held that no stage has
    shapes, facts = known(config)
    limit = int(memory_gb * GB) if memory_gb else device_memory(device.kind)
    peaks = memory(config, shapes, facts, device)
    counts = count_sweep(config, facts.prompts)
    disk = list(on_disk(config, shapes, facts, counts))
    amounts = [*of_data(config, facts), *(file.amount for file in disk), *of_sweep(config, facts, counts)]
    rates, source = rates_of(config, shapes, device.kind, tflops)
    step_s, step = None, ""
    if counts.runs:
        step_s, step = step_of(config, shapes["target"].vocab, device.kind, step_ms)
    problems = [*disk_problems(config, disk), *memory_problems(config, shapes, facts, device, limit)]
    document = {
        "config": config.name,
        "device": device.kind,
        "memory_limit_bytes": limit,
        "amounts": [asdict(amount) for amount in amounts],
        "memory": [{**asdict(peak), "each": peak.each, "total": peak.total} for peak in peaks],
        "hours": device_hours(config, shapes, facts, counts.runs, rates, step_s) if rates else None,
        "rates": source,
        "step": step,
        "ranking": unranked(config),
        "positions": beyond_positions(config),
        "problems": problems,
    }
    lines = [json.dumps(document, indent=2)] if as_json else table(document, peaks, amounts)
    print("\n".join(lines), flush=True)
    if problems:
        raise BadData("; ".join(problems))


def device_hours(
    config: Config, shapes: Mapping[str, Shape], facts: Facts, runs: int, rates: Rates, step_s: float | None
) -> dict[str, float]:
    """By stage. Measuring is left out where no step time is known.

    Every timed run counts as autoregressive decoding of a text of full length: too much where speculation
    pays or texts end early, too little where it does not pay. Timing single steps is not in it.
    """
    done = list(work(config, shapes, facts.labelled, facts.prompts))
    if step_s is None:
        return hours(done, rates)
    spent = hours([*done, *prefills(config, shapes, facts.prompts)], rates)
    spent[MEASURING] += runs * (config.data.max_new_tokens - 1) * step_s / 3600
    return spent


def table(document: Mapping[str, Any], peaks: Sequence[Memory], amounts: Sequence[Amount]) -> Iterator[str]:
    for amount in amounts:
        value = f"{amount.value / GB:,.3f} GB" if amount.unit == "B" else f"{int(amount.value):,}"
        yield f"{amount.name:<38}{value:>18}  {amount.how}"
    parts = ("base", "weights", "gradients", "optimizer", "activations", "logits", "kv")
    limit, spent = document["memory_limit_bytes"], document["hours"] or {}
    yield f"\npeak {document['device']} memory in GB, estimates" + (
        f"; there are {limit / GB:.1f}" if limit else "; no such device here: give --memory-gb"
    )
    yield f"{'stage':<24}" + "".join(f"{part:>12}" for part in (*parts, "a process", "processes", "total"))
    for peak in peaks:
        values = [getattr(peak, part) / GB for part in parts]
        row = "".join(f"{value:>12.3f}" for value in [*values, peak.each / GB])
        yield f"{peak.stage:<24}{row}{peak.processes:>12}{peak.total / GB:>12.3f}"
    yield f"\ndevice-hours; {document['rates']}"
    yield from (f"{stage:<24}{value:>12.3f}" for stage, value in spent.items())
    if MEASURING in spent:
        yield (
            f"timed decoding: runs × tokens × an autoregressive step of the target, {document['step']}; too "
            "much where speculation pays"
        )
    elif spent and document["step"]:
        yield (
            "timed decoding is not in them: give --step-ms X, the milliseconds of an autoregressive step of "
            "the target"
        )
    yield from (f"\n{note}" for note in (document["ranking"], *document["positions"]) if note)
