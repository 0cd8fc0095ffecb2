"""The memory promise of `distill_loss`: no tensor of positions × vocabulary, forward or backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.rows import Row, row
from kernels import distill_loss

POSITIONS, HIDDEN, VOCABULARY = 8192, 64, 131_072


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def memory_row(positions: int = POSITIONS, vocabulary: int = VOCABULARY) -> Row:
    """The largest tensor of a forward and backward pass, as a share of positions × vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, HIDDEN, generator=generator).requires_grad_()
    head = (torch.randn(vocabulary, HIDDEN, generator=generator) / 8).requires_grad_()
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    with Largest() as largest:
        distill_loss.cross_entropy(hidden, head, labels, backend="torch").mean().backward()
    assert hidden.grad is not None and head.grad is not None
    share = largest.elements / (positions * vocabulary)
    assert share < 1, "distill_loss made a tensor of positions × vocabulary"
    name = "distill_loss at 8192 × 128K: its largest tensor ÷ positions × vocabulary"
    return row(name, [share], 0.99, at_most=True, unit="", note="asserted; forward and backward")
