"""What a sweep comes to: its rows and timed runs, and the memory of replaying and of measuring.

What is estimated is estimated upwards, as in `costs.py`: all prompts are as long as the longest context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.cells import Drafter, Pick, chosen_drafter, configured_picks, draft_lengths, view_cells
from pipeline.config import Config
from pipeline.config_sweep import Sweep
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


class Loaded(NamedTuple):
    """A model as the sweep loads it."""

    shape: Shape
    itemsize: int

    @property
    def weights(self) -> int:
        return self.shape.parameters * self.itemsize

    def kv(self, tokens: int) -> int:
        return self.shape.kv_bytes(tokens, self.itemsize)

    def prefill(self, prefix: int, chunk: int, device: Device) -> int:
        """The hidden states and the KV of one layer, and the activations of a chunk."""
        shape, size = self.shape, self.itemsize
        layer = prefix * (shape.hidden + 2 * shape.kv) * size
        alive = layer + min(prefix, chunk) * shape.reading_bytes(size)
        return device.held(alive, prefix * max(shape.hidden, 2 * shape.kv) * size)


def loaded(config: Config, shapes: Mapping[str, Shape]) -> dict[str, Loaded]:
    dtypes = {"target": config.target.dtype, "drafter": config.drafter.dtype}
    return {role: Loaded(shape, ITEMSIZE[dtypes[role]]) for role, shape in shapes.items()}


def longest(config: Config) -> int:
    return max(context.tokens for context in config.data.contexts)


def kept(view: View, prefix: int) -> int:
    return prefix if view.budget is None else min(view.budget, prefix)


def slots(view: View, prefix: int) -> int:
    """As `pipeline.measure.Bench.drafter` allocates them for a prefix."""
    return slots_for(prefix) if view.budget is None else view.budget


def replay_memory(config: Config, shapes: Mapping[str, Shape], device: Device) -> Memory:
    """All draft sources are loaded; the one that takes most replays a prompt behind all its views at once.

    Views are held of two prompts, and those of one once more in the cache. The continuation's logits are
    copied when they are put in order; sampled texts and thresholds then need probabilities in fp32.
    """
    sweep, prefix, count = config.sweep, longest(config), config.data.max_new_tokens
    models, sources = loaded(config, shapes), draft_sources(config)
    roles = [role_of(source) for source in sources]
    weights = (
        roles.count("drafter") * models["drafter"].weights + roles.count("target") * models["target"].weights
    )
    in_fp32 = any(sweep.temperatures) or any(sweep.thresholds)
    peaks = []
    for role, source in zip(roles, sources, strict=True):
        if role is None:
            continue
        model, views = models[role], [cell.view for cell in view_cells(sweep, source)]
        shape, size, tokens = model.shape, model.itemsize, len(views) * count
        held = REMEMBERED * sum(kept(view, prefix) for view in set(views))
        cached = sum(kept(view, prefix) for view in views) + tokens
        logits = tokens * shape.vocab
        copies = logits * max(2 * size, size + 2 * FP32 * in_fp32)
        prefill = model.prefill(prefix, config.decode.prefill_chunk, device)
        peaks.append(
            Memory(
                "sweep replay",
                device.base_bytes,
                weights,
                activations=max(prefill, tokens * shape.reading_bytes(size)),
                logits=device.held(copies, logits * size),
                kv=device.held(model.kv(held + cached), prefix * shape.kv * size),
            )
        )
    return max(peaks, key=lambda peak: peak.each)


def measure_memory(
    config: Config, shapes: Mapping[str, Shape], places: Iterable[Place], device: Device
) -> Memory:
    """All models are loaded, with a static cache for every timed budget of each; calibrating has no more.

    Beside the caches are the views that they are loaded from: the target's full view of the prompt that is
    read, and of the one before it; where it speculates for itself, all its sparse ones, and a full one again
    that they are read with; those of the drafter whose turn it is.
    """
    sweep, prefix = config.sweep, longest(config)
    models, sources = loaded(config, shapes), draft_sources(config)
    target, drafter = models["target"], models["drafter"]
    room = config.data.max_new_tokens + max(sweep.gammas)
    cached, held = {"target": slots_for(prefix) + room, "drafter": 0}, {"target": 0, "drafter": 0}
    timed = timed_views(config, sources, places)
    for source in sources:
        role, views = role_of(source), timed[source.name]
        if role is not None:
            cached[role] += sum(each + room for each in {slots(view, prefix) for view in views})
            held[role] = max(held[role], sum(kept(view, prefix) for view in views))
    together = min(sweep.measure.prompts_together, sweep.measure.prompts)
    kv = sum(model.kv(together * (cached[role] + held[role])) for role, model in models.items())
    drafters = sum(role_of(source) == "drafter" for source in sources)
    whole = 1 + (together > 1) + (held["target"] > 0)
    chunk = config.decode.prefill_chunk
    return Memory(
        "sweep measure",
        device.base_bytes + INDUCTOR_BYTES * (config.decode.compile != "none"),
        target.weights + drafters * drafter.weights,
        activations=max(model.prefill(prefix, chunk, device) for model in models.values()),
        logits=LOGIT_COPIES * FP32 * together * room * target.shape.vocab,
        kv=kv + target.kv(whole * prefix),
    )


def timed_views(config: Config, sources: Iterable[Drafter], places: Iterable[Place]) -> dict[str, set[View]]:
    """The views of each draft source that are timed; predictions may point at any."""
    if config.sweep.predicts:
        cells = {source.name: view_cells(config.sweep, source) for source in sources}
        return {name: {cell.view for cell in own if not cell.control} for name, own in cells.items()}
    timed: dict[str, set[View]] = {source.name: set() for source in sources}
    for place in places:
        for pick in picks_of(config, place):
            timed[pick.drafter].add(pick.cell.view)
    return timed
