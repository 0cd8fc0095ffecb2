"""The memory of a process at its peak: what the formulas of the stages share. Nothing is loaded.

Sizes are in bytes. Prefixes are taken to be as long, and views as many, as they can be. Still the sums are no
upper bounds: what allocators and libraries hold beside the tensors is counted only as far as constants say,
so that a process may take more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.decode.products import packed_bytes
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


def weights_together(shapes: Sequence[Shape], device: Device) -> int:
    """Of models that decode in one process: what lies around the layers of `first_layers` drafters is held
    once."""
    packed = sum(packed_bytes(shape.weights, shape.itemsize, device.kind) for shape in shapes)
    own = sum(shape.weights - shape.frozen * shape.itemsize for shape in shapes)
    # The target holds the rest too; without it, or in another precision, the first of the drafters does.
    whole = [shape.itemsize for shape in shapes if not shape.frozen]
    alone = any(shape.frozen and shape.itemsize not in whole for shape in shapes)
    return packed + own + max((shape.frozen * shape.itemsize for shape in shapes), default=0) * alone
