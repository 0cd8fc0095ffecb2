"""Peak memory of replaying and measuring, by formula.

Prompts are taken to be as long as the longest context, and the timed views to be all that predictions may
point at. Still the sum is no upper bound: what libraries hold beside the tensors is not in it, and a process
that measured on a CPU took an eighth more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.axes import Place, View
from pipeline.config.models import Head, Role
from pipeline.config.schema import Config
from pipeline.decode.runner import LOGIT_COPIES
from pipeline.hardware import Device
from pipeline.kv.slot_cache import capacity_of, slots_for
from pipeline.models.shape import Shape
from pipeline.plan.peaks import FP32, Memory, packed_bytes, reading_bytes
from pipeline.sweep.grid import draft_sources, views_of
from pipeline.sweep.picks import picks_at
from pipeline.sweep.replayer import REMEMBERED

INDUCTOR_BYTES = 100_000_000  # resident, measured on Linux with the pinned version


def kept(views: Iterable[View], prefix: int) -> int:
    """Entries of a prefix that these views keep."""
    return sum(prefix if view.budget == "full" else min(view.budget, prefix) for view in views)


def weights_together(shapes: Sequence[Shape], device: Device) -> int:
    """Of models in one process: what lies around the layers of `first_layers` drafters is held once."""
    packed = sum(packed_bytes(shape, device) for shape in shapes)
    own = sum(shape.weights - shape.frozen * shape.itemsize for shape in shapes)
    # The target holds the rest too; without it, or in another precision, the first of the drafters does.
    whole = [shape.itemsize for shape in shapes if not shape.frozen]
    alone = any(shape.frozen and shape.itemsize not in whole for shape in shapes)
    return packed + own + max((shape.frozen * shape.itemsize for shape in shapes), default=0) * alone


def num_drafters(config: Config) -> int:
    """Drafters that an evaluator loads: those that are swept, and that of a cascade."""
    names = {source.name for source in draft_sources(config) if source.role == "drafter"}
    return len(names | ({config.sweep.cascade.drafter} if config.sweep.cascade else set()))


def prefill_bytes(shape: Shape, prefix: int, chunk: int, device: Device) -> int:
    """The hidden states and the KV of one layer, and the activations of a chunk."""
    alive = prefix * (shape.hidden + 2 * shape.kv) * shape.itemsize
    alive += min(prefix, chunk) * reading_bytes(shape)
    return device.held(alive, prefix * max(shape.hidden, 2 * shape.kv) * shape.itemsize)


def replay_memory(config: Config, shapes: Mapping[Role, Shape], device: Device) -> Memory:
    """All draft sources are loaded; the one that takes most replays a prompt behind all its views at once.

    The views of two prompts are held, and those of one prompt once more in the cache. The continuation's
    logits are copied when they are put in order; sampled texts and thresholds then need probabilities in
    fp32.
    """
    sweep, prefix = config.sweep, max(config.data.context_tokens.values())
    sources = [(source, shapes[source.role]) for source in draft_sources(config) if source.role]
    targets = [shapes["target"]] if any(source.role == "target" for source, _ in sources) else []
    weights = weights_together([*targets, *[shapes["drafter"]] * num_drafters(config)], device)
    whole = 0
    if isinstance(config.drafter, Head):  # over the target, which reads each prompt whole
        target = shapes["target"]
        weights += target.weights + packed_bytes(target, device)
        whole = 2 * target.kv_bytes(prefix) + prefill_bytes(
            target, prefix, config.decode.prefill_chunk, device
        )
    in_fp32 = any(sweep.temperatures) or any(sweep.thresholds)
    peaks = []
    for source, shape in sources:
        views = [view.kept for view in views_of(sweep, source)]
        tokens, size = len(views) * config.data.max_new_tokens, shape.itemsize
        held = REMEMBERED * kept(set(views), prefix) + kept(views, prefix) + tokens
        inner = 0
        if source.baseline == "cascade" and sweep.cascade:
            inner = shapes["drafter"].kv_bytes(REMEMBERED * kept([sweep.cascade.view], prefix))
        logits = tokens * shape.vocab
        copies = logits * max(2 * size, size + 2 * FP32 * in_fp32)
        prefill = prefill_bytes(shape, prefix, config.decode.prefill_chunk, device)
        peaks.append(
            Memory(
                "sweep replay",
                device.base_bytes,
                weights,
                activations=max(prefill, tokens * reading_bytes(shape)),
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
        held[source.role] = max(held[source.role], kept(views, prefix))
        if inner and views:
            cached["drafter"] += capacity_of(inner.view, prefix) + room + beyond
            held["drafter"] = max(held["drafter"], kept([inner.view], prefix))
    together = min(sweep.measure.prompts_together, sweep.measure.prompts)
    target, chunk = shapes["target"], config.decode.prefill_chunk
    kv = sum(shapes[role].kv_bytes(together * (cached[role] + held[role])) for role in cached)
    whole = 1 + (together > 1) + (held["target"] > 0)
    drafters = num_drafters(config)
    return Memory(
        "sweep measure",
        device.base_bytes + INDUCTOR_BYTES * (config.decode.compile != "none"),
        weights_together([target, *[shapes["drafter"]] * drafters], device),
        activations=max(prefill_bytes(shape, prefix, chunk, device) for shape in shapes.values()),
        logits=LOGIT_COPIES * FP32 * together * room * target.vocab,
        kv=kv + target.kv_bytes(whole * prefix),
    )
