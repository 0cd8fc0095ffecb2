"""Peak memory of labelling and of writing continuations, by formula."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.hardware import Device
from pipeline.models.shape import Shape
from pipeline.plan.peaks import FP32, Memory, packed_bytes, reading_bytes
from pipeline.train.target.labelling import POSITIONS


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
    reading = device.held(batch * length * reading_bytes(shape), batch * length * wide)
    made = device.held(logits, logits) + device.held(copies, copies // 2)
    start = (device.base_bytes, shape.weights + packed_bytes(shape, device))
    peaks = [Memory("teach", *start, activations=reading), Memory("teach", *start, logits=made)]

    writing = [(min(batch, prompts), max(data.context_tokens.values()), data.max_new_tokens)]
    if labels.on_policy_fraction or config.data.asks:
        count = config.train.learned_tokens
        writing.append((batch, length - count, count))
    for rows, prefix, count in writing:
        cache = shape.kv_bytes(rows * (prefix + count))
        larger = max(cache, rows * prefix * reading_bytes(shape))
        alive = shape.kv_bytes(rows * prefix) + larger
        peaks.append(Memory("teach", *start, kv=device.held(alive, rows * prefix * shape.kv * size)))
    return max(peaks, key=lambda peak: peak.each)
