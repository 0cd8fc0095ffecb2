"""What a training worker holds of a model: its weights, their gradients, and the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.hardware import HEAP_FACTOR, Device

FP32 = 4
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default of zero_optimization.reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters


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
