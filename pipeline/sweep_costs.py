"""What a sweep comes to: its rows and timed runs, and the memory of replaying and of measuring.

What is estimated is estimated upwards, as in `costs.py`: all prompts are as long as the longest context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.cells import Drafter, Pick, ViewCell, chosen_drafter, configured_picks, draft_lengths, view_cells
from pipeline.config import Config, Sweep
from pipeline.costs import FP32, ITEMSIZE, Device, Memory, Shape
from pipeline.kv import View
from pipeline.measure import LOGIT_COPIES
from pipeline.planner import Place, plane_picks
from pipeline.slots import slots_for

REMEMBERED = 2  # prompts whose views `pipeline.prompt_replay.PromptViews` holds
INDUCTOR_BYTES = 100_000_000  # resident, measured on Linux with the pinned version


def draft_sources(config: Config) -> list[Drafter]:
    """What the sweep evaluates, without the models: the chosen drafters, then the baselines."""
    names = [drafter.name for drafter in config.train.drafters]
    chosen = [Drafter(name, None, 0) for name in names if chosen_drafter(name, config.sweep.drafters)]
    return chosen + [Drafter(name, None, 0, name) for name in config.sweep.baselines]


def role_of(source: Drafter) -> str | None:
    """Whose shape a source's model has; prompt lookup has none."""
    return {None: "drafter", "self_speculation": "target"}.get(source.baseline)


def texts(sweep: Sweep, temperatures: Iterable[float]) -> tuple[int, int]:
    """Greedy and sampled continuations of one prompt at these temperatures."""
    greedy = [temperature == 0 for temperature in temperatures]
    return sum(greedy), (len(greedy) - sum(greedy)) * len(sweep.seeds)


# ── counts ────────────────────────────────────────────────────────────────────────────────────────


class SweepCounts(NamedTuple):
    """Rows, and the runs that are timed, those of autoregressive decoding included."""

    replayed: int
    measured: int
    runs: int


def count_sweep(config: Config, prompts: Mapping[Place, int]) -> SweepCounts:
    """Rows are one a prompt, cell and text: drafters × views × lengths × texts.

    At most: a prompt whose continuation ends at once has none, and none has `other_prompt` where there is no
    other document. Thresholds are replayed on greedy text only. What is measured because of its predicted
    speed comes on top.

    Args:
        prompts: of the test split.
    """
    sweep, measure = config.sweep, config.sweep.measure
    greedy, sampled = texts(sweep, sweep.temperatures)
    timed_texts = sum(texts(sweep, measure.temperatures or sweep.temperatures))
    replayed = measured = runs = 0
    for place, count in prompts.items():
        for source in draft_sources(config):
            lengths = draft_lengths(sweep, place.context, source)
            fixed = [length for length in lengths if not length.threshold]
            views = len(view_cells(sweep, source))
            replayed += count * views * (greedy * len(lengths) + sampled * len(fixed))
        picks, timed = picks_of(config, place), min(count, measure.prompts)
        measured += timed * len(picks) * timed_texts
        batches = math.ceil(timed / measure.prompts_together)
        runs += batches * measure.repeats * timed_texts * (len(picks) + len({pick.drafter for pick in picks}))
    if sweep.mode == "replay":
        return SweepCounts(replayed, 0, 0)
    return SweepCounts(replayed * (sweep.mode == "both"), measured, runs)


def picks_of(config: Config, place: Place) -> list[Pick]:
    """What is measured whatever is predicted."""
    sources = draft_sources(config)
    picks = configured_picks(config.sweep, sources, place.context)
    return list(dict.fromkeys(picks + plane_picks(config.sweep, place, [source.name for source in sources])))


# ── memory ────────────────────────────────────────────────────────────────────────────────────────


def replay_memory(config: Config, shapes: Mapping[str, Shape], device: Device) -> Memory:
    """Every model is loaded; the draft source that takes most replays a prompt behind all its views at once.

    Views are held of two prompts, and once more in the cache. The continuation's logits are copied while they
    are put in order; sampled texts and thresholds then need probabilities in fp32.
    """
    sweep, prefix, count = config.sweep, longest(config), config.data.max_new_tokens
    sampled = sum(texts(sweep, sweep.temperatures)[1:]) > 0
    weights = sum(weight_bytes(config, role, shape, measuring=False) for role, shape in shapes.items())
    peaks = []
    for source in draft_sources(config):
        role = role_of(source)
        if role is None:
            continue
        shape, size, cells = shapes[role], itemsize(config, role), view_cells(sweep, source)
        kept = {cell.view: min(capacity(cell.view, prefix), prefix) for cell in cells}
        entries = REMEMBERED * sum(kept.values()) + sum(kept[cell.view] + count for cell in cells)
        logits = len(cells) * count * shape.vocab
        copies = 2 * logits * size
        if sampled or any(sweep.thresholds):
            copies = max(copies, logits * (size + 2 * FP32))
        continuing = len(cells) * count * shape.reading_bytes(size)
        peaks.append(
            Memory(
                "sweep replay",
                device.base_bytes,
                weights,
                activations=max(reading(config, shape, size, device), continuing),
                logits=device.held(copies, logits * size),
                kv=device.held(shape.kv_bytes(entries, size), prefix * shape.kv * size),
            )
        )
    return max(peaks, key=lambda peak: peak.each)


def measure_memory(
    config: Config, shapes: Mapping[str, Shape], places: Iterable[Place], device: Device
) -> Memory:
    """Every model is loaded, with a static cache for each of its timed budgets; calibration has no more.

    Beside the caches there are the views that they are loaded from: of the target's prefill one prompt's
    full view and all sparse ones of self-speculation, and those of the drafter whose turn it is.
    """
    sweep, prefix = config.sweep, longest(config)
    room = config.data.max_new_tokens + max(sweep.gammas)
    caches, views = {"target": capacity(None, prefix) + room, "drafter": 0}, {"target": 0, "drafter": 0}
    timed = timed_views(config, places)
    for source in draft_sources(config):
        role, own = role_of(source), timed.get(source.name, set())
        if role is None:
            continue
        caches[role] += sum(slots + room for slots in {capacity(view, prefix) for view in own})
        views[role] = max(views[role], sum(min(capacity(view, prefix), prefix) for view in own))
    together = min(sweep.measure.prompts_together, sweep.measure.prompts)
    sizes = {role: itemsize(config, role) for role in shapes}
    kv = {
        role: shape.kv_bytes(together * (caches[role] + views[role]), sizes[role])
        for role, shape in shapes.items()
    }
    return Memory(
        "sweep measure",
        device.base_bytes + INDUCTOR_BYTES * (config.decode.compile != "none"),
        sum(weight_bytes(config, role, shape, measuring=True) for role, shape in shapes.items()),
        activations=max(reading(config, shape, sizes[role], device) for role, shape in shapes.items()),
        logits=LOGIT_COPIES * FP32 * together * room * shapes["target"].vocab,
        kv=sum(kv.values()) + shapes["target"].kv_bytes(prefix, sizes["target"]),
    )
