"""What the kernels' tests share."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (or the largest integer): what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that any torch operation made, other than views of `known`."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.num_bytes = max(self.num_bytes, storage.nbytes())
        return result


@pytest.fixture
def largest_allocation() -> type[LargestAllocation]:
    return LargestAllocation
