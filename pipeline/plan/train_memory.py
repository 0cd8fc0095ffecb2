"""Peak memory of pretraining, of teaching and of training drafters, by formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from kernels.distill_tiles import SCRATCH_BYTES
from pipeline.config.models import Role
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.hardware import Device
from pipeline.kv.slot_cache import slots_for
from pipeline.models.shape import Shape
from pipeline.plan.peaks import FP32, Memory, weights_together
from pipeline.train.batches import largest, last_starts, product_bytes
from pipeline.train.sharding import Sharding, behind_views, training_step
from pipeline.train.target.labelling import POSITIONS

PATH_COPIES = 3  # of the path term's fp32 logits: as they are, at its temperature, log-probabilities


def pretrain_memory(config: Config, role: Role, shape: Shape, sharding: Sharding, device: Device) -> Memory:
    """Next-token training: the activations of all layers of a micro-batch, and its logits in fp32."""
    length = config.scratch[role].pretrain.sequence_tokens or config.data.sequence_tokens
    tokens = config.train.micro_batch_sequences * length
    activations, logits = training_step(shape, tokens, config.train.dtype == "bfloat16", device)
    state = sharding.state_bytes(shape.trained, device, shape.frozen)
    return Memory(f"pretrain {role}", device.base_bytes, *state, activations, logits)


def teach_memory(config: Config, shape: Shape, prompts: int, device: Device) -> Memory:
    """The larger of labelling a batch of sequences and continuing a batch of the longest of a file's prompts.

    Labelling makes the logits of all positions, and of a slice of them the copies that labels need.
    Continuing holds the prefix KV twice while its cache is filled.
    """
    data, labels, size = config.data, config.labels, shape.itemsize
    batch, length, wide = labels.batch_sequences, data.sequence_tokens, size * shape.intermediate
    logits = batch * length * shape.vocab * size
    per_logit = 2 * FP32 if labels.top_k else size + 1
    copies = batch * min(length, POSITIONS) * shape.vocab * per_logit
    reading = device.held(batch * length * shape.reading_bytes, batch * length * wide)
    made = device.held(logits, logits) + device.held(copies, copies // 2)
    start = (device.base_bytes, weights_together([shape], device))
    peaks = [Memory("teach", *start, activations=reading), Memory("teach", *start, logits=made)]

    writing = [(min(batch, prompts), max(data.context_tokens.values()), data.max_new_tokens)]
    if labels.on_policy_fraction or config.data.asks:
        count = config.train.learned_tokens
        writing.append((batch, length - count, count))
    for rows, prefix, count in writing:
        cache = shape.kv_bytes(rows * (prefix + count))
        larger = max(cache, rows * prefix * shape.reading_bytes)
        alive = shape.kv_bytes(rows * prefix) + larger
        peaks.append(Memory("teach", *start, kv=device.held(alive, rows * prefix * shape.kv * size)))
    return max(peaks, key=lambda peak: peak.each)


def train_memory(
    config: Config, variant: Variant, steps: int, shape: Shape, sharding: Sharding, device: Device
) -> Memory:
    """The two-branch loss: one prefill, the views of every window, one forward of all windows behind them.

    A window starts as late as it can, and the budgets drawn are the largest. The full view of a prefix is
    the prefill's own KV; other views are copies. A head keeps the prefill for its backward pass. The paths of
    the path term are read beside; what the target adds is in `with_target`.

    Args:
        steps: of all variants that one process trains, one after another.
    """
    train, length, shape = config.train, config.data.sequence_tokens, replace(shape, itemsize=FP32)
    micro, bfloat16, full = train.micro_batch_sequences, train.dtype == "bfloat16", variant.full_weight > 0
    drawn = largest(variant, train, length)
    starts = drawn.starts
    kept = [min(budget, start) for budget in drawn.budgets for start in starts]
    behind = [*kept, *(starts if full else [])]
    depth = config.chain_steps if shape.features else 0
    views = shape.kv_bytes(micro * (sum(kept) + (starts[0] if full else 0)))
    activations, logits, kv = behind_views(shape, micro, behind, train.window_tokens, depth, bfloat16, device)
    made = FP32 * micro * train.window_tokens * len(behind) * shape.logits * max(1, depth)
    if made > train.max_logits_mib * 2**20 and sharding.stage != 3:
        logits = min(logits, SCRATCH_BYTES)
    if variant.path:
        most = kept[0] if kept else starts[0]
        paths = [min(most, start) for start in starts] * variant.path.paths
        window, chain = (1, variant.path.length) if depth else (variant.path.length, 0)
        more = behind_views(shape, micro, paths, window, chain, bfloat16, device)
        activations, logits, kv = (sum(both) for both in zip((activations, logits, kv), more, strict=True))
    reading = device.held(
        micro * starts[0] * shape.reading_bytes, FP32 * micro * starts[0] * shape.intermediate
    )
    if depth:
        activations += FP32 * micro * length * (2 * shape.features + 8 * shape.hidden)
    compiled = product_bytes(train, steps, length) if bfloat16 and device.kind == "cpu" else 0
    return Memory(
        f"train {variant.name}",
        device.base_bytes + compiled,
        *sharding.state_bytes(shape.trained, device, shape.frozen),
        activations=max(activations, reading),
        logits=logits,
        kv=views + kv,
    )


def with_target(
    peak: Memory, config: Config, variant: Variant, shapes: Mapping[Role, Shape], texts: int, device: Device
) -> Memory:
    """The peak of training a variant, with what its worker has of the target.

    A head begins as the target's last layer, in fp32, and then reads tokens by its embedding: of a file that
    is mapped all stays that was read. So do stored features; otherwise the target reads the texts anew. For
    the path term it has the prefixes' KV twice, and log-probabilities of all tokens of the paths.

    Args:
        texts: sequences and answers that are labelled.
    """
    train, target, width, path = config.train, shapes["target"], shapes["drafter"].features, variant.path
    length, micro, mapped = config.data.sequence_tokens, train.micro_batch_sequences, device.kind == "cpu"
    recomputed, more = width and config.labels.features == "recomputed", Counter[str]()
    if width:
        more["weights"] = FP32 * (target.parameters if mapped else target.hidden * target.vocab)
    if width and mapped and not recomputed:
        read = min(texts, train.steps_of(variant) * train.batch_sequences)
        more["activations"] = 2 * width * length * read
    if recomputed or path:
        more["weights"] += weights_together([target], device)
        more["activations"] += target.prefill_bytes(micro, length, config.decode.prefill_chunk, device)
    if path:
        cached = slots_for(last_starts(train, length)[0]) + path.length
        more["kv"] = target.kv_bytes(micro * (length + train.windows * cached))
        tokens = micro * train.windows * path.paths * path.length
        more["logits"] = FP32 * tokens * PATH_COPIES * (target.vocab + shapes["drafter"].logits)
    return replace(peak, **{part: getattr(peak, part) + size for part, size in more.items()})
