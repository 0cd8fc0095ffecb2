"""What a training worker holds: of a model, of the optimizer, and of a step for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.hardware import HEAP_FACTOR, Device
from pipeline.models.shape import Shape

FP32 = 4
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default of zero_optimization.reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters
LOSS_COPIES = 3  # of fp32 logits: log-softmax and, in backward, the gradients before and behind it


@dataclass(frozen=True)
class Sharding:
    """How optimizer state is spread over `workers`: a ZeRO stage, or None for the plain torch engine."""

    stage: int | None = None
    workers: int = 1
    bucket: int = REDUCE_BUCKET
    live: int = LIVE_PARAMETERS
    offload: bool = False

    def state_bytes(self, parameters: int, device: Device, frozen: int = 0) -> tuple[int, int, int]:
        """Weights, gradients and optimizer state of one worker that trains with AdamW in fp32.

        Of `frozen` parameters there are weights alone. Of the others:
        Weights and gradients take 4 B a parameter, AdamW's two moments 8 B. From stage 1 on each worker has
        moments of its share, with a master copy of them and their gradient; stage 2 also drops other
        workers' gradients, stage 3 their weights, up to what is gathered for use. Gradients travel through a
        bucket, of which a CPU touches what is filled only. On a CPU, by measurement, stage 0 reduces a copy
        of all gradients, stage 2 fills a second bucket while it reduces the first, and what stage 3 gathers
        and frees lies in the heap.
        """
        whole, part = FP32 * parameters, FP32 * parameters // self.workers
        cpu = device.kind == "cpu"
        if not self.stage:
            return whole + FP32 * frozen, whole * (2 if cpu and self.workers > 1 else 1), 2 * whole
        bucket = FP32 * (min(parameters, self.bucket) if cpu else self.bucket)
        gathered = part + FP32 * min(parameters, self.live)
        weights = whole if self.stage < 3 else min(whole + part, gathered)
        gradients = (whole if self.stage == 1 else 0) + part + bucket
        if cpu and self.stage == 2:
            gradients += bucket
        if cpu and self.stage == 3:
            weights, gradients = int(HEAP_FACTOR * weights), int(HEAP_FACTOR * gradients)
        on_device = cpu or not self.offload
        weights += FP32 * frozen // (1 if self.stage < 3 else self.workers)
        return weights, gradients, 3 * part if on_device else 0


def sharding_of(settings: dict[str, Any], workers: int) -> Sharding:
    """From the content of a DeepSpeed settings file."""
    zero = settings.get("zero_optimization", {})
    offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
    live = int(zero.get("stage3_max_live_parameters", LIVE_PARAMETERS))
    return Sharding(int(zero.get("stage", 0)), workers, bucket, live, offload)


def training_step(shape: Shape, tokens: int, bfloat16: bool, device: Device) -> tuple[int, int]:
    """Activations and logits of a forward and backward pass.

    One layer at a time also has its gradients: two of the MLP's width, two of the model's.
    """
    wide, narrow = FP32 * tokens * shape.intermediate, FP32 * tokens * shape.hidden
    mlp = shape.layers * 4 * wide // (2 if bfloat16 else 1)
    rest = shape.layers * tokens * shape.training_bytes(bfloat16) - mlp
    activations = device.held(mlp + 2 * wide, wide) + device.held(rest + 2 * narrow, narrow)
    logits = FP32 * tokens * shape.logits
    return activations, device.held(LOSS_COPIES * logits + (logits // 2 if bfloat16 else 0), logits)


def behind_views(
    shape: Shape, micro: int, behind: Sequence[int], length: int, depth: int, bfloat16: bool, device: Device
) -> tuple[int, int, int]:
    """Activations, logits and KV of `length` tokens behind so many kept entries each, forward and backward.

    A cache copies the views, and backward makes the gradients of one layer of it twice. A head keeps, at
    each of the `depth` steps of its chains, what tokens attend to: the weights, and keys and values once
    more for each query head. Such prefixes are rare where windows start, so that HEAP_FACTOR is not applied.

    Args:
        micro: rows of each window.
        depth: of the chains of a head; 0 for other drafters.
    """
    tokens, seen = micro * length * len(behind), micro * (sum(behind) + length * len(behind))
    steps = replace(shape, layers=depth or shape.layers)  # a chain runs its one layer again and again
    activations, logits = training_step(steps, tokens, bfloat16, device)
    if depth:
        kv = FP32 * depth * seen * (shape.heads * length + 2 * shape.query) // (2 if bfloat16 else 1)
        return activations, depth * logits, kv
    cache = shape.kv_bytes(seen)
    # Under autocast attention reads, and keeps for backward, a bfloat16 copy of the cache.
    return activations, logits, cache + (cache // 2 if bfloat16 else 0) + 2 * cache // shape.layers
