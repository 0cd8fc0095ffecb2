"""`budgetdraft plan`: what a config will cost, and whether it fits, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from jobs.plan.amounts import GB, amounts, disk_problems, on_disk
from jobs.plan.facts import known
from jobs.plan.memory import device_of, memory, memory_problems
from jobs.stages.pipeline import settled
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.hardware import device_memory
from pipeline.models.check import beyond_positions
from pipeline.plan.flops import MEASURING, hours, prefills, work
from pipeline.plan.peaks import PARTS
from pipeline.plan.rates import rates_of, step_of
from pipeline.sweep.counts import count_sweep
from pipeline.sweep.picks import unranked


def plan(
    config: Config,
    as_json: bool,
    memory_gb: float | None,
    tflops: float | None,
    step_ms: float | None = None,
) -> None:
    """Print what every stage takes.

    Every timed run counts as autoregressive decoding of a text of full length: too much where speculation
    pays or texts end early, too little where it does not pay. Timing of single steps is not counted. If no
    step time is known, the hours do not include measuring.

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
    # Measured first: once documents are read, this process holds memory that no stage would hold.
    device = device_of(config)
    shapes, facts = known(config)
    limit = int(memory_gb * GB) if memory_gb else device_memory(device.kind)
    counts = count_sweep(config, facts.prompts)
    disk, missing = zip(*on_disk(config, shapes, facts, counts), strict=True)
    rates, source = rates_of(config, shapes, device.kind, tflops)
    step_s, step, spent = None, "", None
    if counts.runs:
        step_s, step = step_of(config, shapes["target"].vocab, device.kind, step_ms)
    if rates:
        reading = prefills(config, shapes, facts.prompts) if step_s else []
        spent = hours([*work(config, shapes, facts.labelled, facts.answers, facts.prompts), *reading], rates)
        if step_s:
            spent[MEASURING] += counts.runs * (config.data.max_new_tokens - 1) * step_s / 3600
    problems = [*disk_problems(config, sum(missing)), *memory_problems(config, shapes, facts, device, limit)]
    document = {
        "config": config.name,
        "device": device.kind,
        "memory_limit_bytes": limit,
        "amounts": [amount._asdict() for amount in amounts(config, facts, counts, disk)],
        "memory": [
            {**asdict(peak), "each": peak.each, "total": peak.total}
            for peak in memory(config, shapes, facts, device)
        ],
        "hours": spent,
        "rates": source,
        "step": step,
        "ranking": unranked(config),
        "positions": beyond_positions(config),
        "problems": problems,
    }
    print(json.dumps(document, indent=2) if as_json else "\n".join(table(document)), flush=True)
    if problems:
        raise BadData("; ".join(problems))


def table(document: Mapping[str, Any]) -> Iterator[str]:
    for amount in document["amounts"]:
        value = f"{amount['value'] / GB:,.3f} GB" if amount["unit"] == "B" else f"{amount['value']:,}"
        yield f"{amount['name']:<38}{value:>18}  {amount['how']}"
    limit, spent = document["memory_limit_bytes"], document["hours"] or {}
    there = f"there are {limit / GB:.1f}" if limit else "no such device here: give --memory-gb"
    yield f"\npeak {document['device']} memory in GB, estimates; {there}"
    yield f"{'stage':<24}" + "".join(f"{part:>12}" for part in (*PARTS, "a process", "processes", "total"))
    for peak in document["memory"]:
        row = "".join(f"{peak[part] / GB:>12.3f}" for part in (*PARTS, "each"))
        yield f"{peak['stage']:<24}{row}{peak['processes']:>12}{peak['total'] / GB:>12.3f}"
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
