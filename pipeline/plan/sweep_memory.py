"""Peak memory of replaying and measuring, by formula."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.axes import Place, View
from pipeline.config.schema import Config
from pipeline.decode.runner import LOGIT_COPIES
from pipeline.kv.slot_cache import slots_for
from pipeline.plan.shapes import FP32, ITEMSIZE, Device, Memory, Shape
from pipeline.plan.sweep_counts import draft_sources, longest, picks_of, role_of
from pipeline.sweep.grid import Drafter, views_of

REMEMBERED = 2  # prompts whose views `pipeline.sweep.replayer.PromptViews` holds

INDUCTOR_BYTES = 100_000_000  # resident, measured on Linux with the pinned version


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


def kept(view: View, prefix: int) -> int:
    return prefix if view.budget == "full" else min(view.budget, prefix)


def slots(view: View, prefix: int) -> int:
    """As `pipeline.decode.bench.Bench.drafter` allocates them for a prefix."""
    return slots_for(prefix) if view.budget == "full" else view.budget


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
        model, views = models[role], [view.kept for view in views_of(sweep, source)]
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
        views = {source.name: views_of(config.sweep, source) for source in sources}
        return {name: {view.kept for view in own if not view.control} for name, own in views.items()}
    timed: dict[str, set[View]] = {source.name: set() for source in sources}
    for place in places:
        for pick in picks_of(config, place):
            timed[pick.drafter].add(pick.view.kept)
    return timed
