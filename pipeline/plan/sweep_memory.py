"""Peak memory of replaying and measuring, by formula.

Prompts are taken to be as long as the longest context, and the timed views to be all that predictions may
point at. Still the sum is no upper bound: what libraries hold beside the tensors is not in it, and a process
that measured on a CPU took an eighth more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pipeline.axes import Place
from pipeline.config.models import Head, Role
from pipeline.config.schema import Config
from pipeline.decode.runner import LOGIT_COPIES
from pipeline.hardware import Device
from pipeline.kv.slot_cache import capacity_of, slots_for
from pipeline.kv.views import entries
from pipeline.models.shape import Shape
from pipeline.plan.peaks import FP32, Memory, weights_together
from pipeline.sweep.grid import draft_sources, loaded_drafters, views_of
from pipeline.sweep.picks import picks_at
from pipeline.sweep.replayer import REMEMBERED

INDUCTOR_BYTES = 100_000_000  # resident, measured on Linux with the pinned version


def replay_memory(config: Config, shapes: Mapping[Role, Shape], device: Device) -> Memory:
    """All draft sources are loaded; the one that takes most replays a prompt behind all its views at once.

    The views of two prompts are held, and those of one prompt once more in the cache. The continuation's
    logits are copied when they are put in order; sampled texts and thresholds then need probabilities in
    fp32.
    """
    sweep, prefix = config.sweep, max(config.data.context_tokens.values())
    sources = [(source, shapes[source.role]) for source in draft_sources(config) if source.role]
    target, chunk, headed = shapes["target"], config.decode.prefill_chunk, isinstance(config.drafter, Head)
    targets = [target] if headed or any(source.role == "target" for source, _ in sources) else []
    weights = weights_together([*targets, *[shapes["drafter"]] * len(loaded_drafters(config))], device)
    whole = 0
    if headed:  # over the target, which reads each prompt whole
        whole = 2 * target.kv_bytes(prefix) + target.prefill_bytes(1, prefix, chunk, device)
    in_fp32 = any(sweep.temperatures) or any(sweep.thresholds)
    peaks = []
    for source, shape in sources:
        views = [view.kept for view in views_of(sweep, source)]
        tokens, size = len(views) * config.data.max_new_tokens, shape.itemsize
        held = REMEMBERED * entries(set(views), prefix) + entries(views, prefix) + tokens
        inner = 0
        if source.baseline == "cascade" and sweep.cascade:
            inner = shapes["drafter"].kv_bytes(REMEMBERED * entries([sweep.cascade.view], prefix))
        logits = tokens * shape.vocab
        copies = logits * max(2 * size, size + 2 * FP32 * in_fp32)
        prefill = shape.prefill_bytes(1, prefix, chunk, device)
        peaks.append(
            Memory(
                "sweep replay",
                device.base_bytes,
                weights,
                activations=max(prefill, tokens * shape.reading_bytes),
                logits=device.held(copies, logits * size),
                kv=whole + inner + device.held(shape.kv_bytes(held), prefix * shape.kv * size),
            )
        )
    return max(peaks, key=lambda peak: peak.each)


def measure_memory(
    config: Config, shapes: Mapping[Role, Shape], places: Iterable[Place], device: Device
) -> Memory:
    """All models are loaded, with a static cache for every timed budget of each; calibrating has no more.

    Beside the caches are the views that they are loaded from: the target's full views of the prompt that is
    read and of the prompt before it; for self-speculation and cascades all the target's sparse views, and one
    more full view that is read with them; and the views of the drafter that is measured at the time. The
    middle of a cascade and its drafter have caches of their own.
    """
    sweep, prefix, sources = config.sweep, max(config.data.context_tokens.values()), draft_sources(config)
    room = config.data.max_new_tokens + max(sweep.gammas)
    named = [pick for place in places for pick in picks_at(sweep, sources, place)]
    cached: dict[Role, int] = {"target": slots_for(prefix) + room, "drafter": 0}
    held: dict[Role, int] = dict.fromkeys(cached, 0)
    for source in sources:
        if source.role is None:
            continue
        # Predictions may point at any view.
        predicted = sweep.predicts and source.predictable
        views = {view.kept for view in views_of(sweep, source) if predicted and not view.control}
        views |= {pick.view.kept for pick in named if pick.drafter == source.name}
        inner = sweep.cascade if source.baseline == "cascade" else None
        beyond = inner.gamma if inner else 0
        cached[source.role] += sum(
            capacity + room + beyond for capacity in {capacity_of(view, prefix) for view in views}
        )
        held[source.role] = max(held[source.role], entries(views, prefix))
        if inner and views:
            cached["drafter"] += capacity_of(inner.view, prefix) + room + beyond
            held["drafter"] = max(held["drafter"], entries([inner.view], prefix))
    together = min(sweep.measure.prompts_together, sweep.measure.prompts)
    target, chunk = shapes["target"], config.decode.prefill_chunk
    kv = sum(shapes[role].kv_bytes(together * (cached[role] + held[role])) for role in cached)
    whole = 1 + (together > 1) + (held["target"] > 0)
    drafters = [shapes["drafter"]] * len(loaded_drafters(config))
    return Memory(
        "sweep measure",
        device.base_bytes + INDUCTOR_BYTES * (config.decode.compile != "none"),
        weights_together([target, *drafters], device),
        activations=max(shape.prefill_bytes(1, prefix, chunk, device) for shape in shapes.values()),
        logits=LOGIT_COPIES * FP32 * together * room * target.vocab,
        kv=kv + target.kv_bytes(whole * prefix),
    )
