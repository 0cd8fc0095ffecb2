"""The memory of a process at its peak: what the formulas of the stages share. Nothing is loaded.

Sizes are in bytes. Prefixes are taken to be as long, and views as many, as they can be. Still the sums are no
upper bounds: what allocators and libraries hold beside the tensors is counted only as far as constants say,
so that a process may take more.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.decode.products import LARGE_BYTES
from pipeline.hardware import Device
from pipeline.models.shape import Shape

FP32 = 4
PARTS = ("base", "weights", "gradients", "optimizer", "activations", "logits", "kv")


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one process of a stage, by what they are for. `processes` share the device."""

    stage: str
    base: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv: int = 0
    processes: int = 1

    @property
    def each(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total(self) -> int:
        return self.processes * self.each


def reading_bytes(shape: Shape) -> int:
    """What one token needs in the layer that is being computed without gradients."""
    widest = max(3 * shape.intermediate, 4 * shape.query + 3 * shape.kv)
    return shape.itemsize * (2 * shape.hidden + widest)


def packed_bytes(shape: Shape, device: Device) -> int:
    """The second copy of a large model's weights that decoding on a CPU reads (`decode.products`)."""
    large = device.kind == "cpu" and shape.itemsize == FP32 and shape.weights >= LARGE_BYTES
    return shape.weights if large else 0
