"""What the training loop asks of an engine, and the plain torch one. DeepSpeed's is in `jobs/`.

An engine's state is three parts by parameter name: the fp32 weights and AdamW's two moments, whole, however
they are sharded while training. So any engine can go on from the state of another one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.layers import trained_parameters

Part = Literal["weights", "exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Part, Part] = ("exp_avg", "exp_avg_sq")
PARTS: tuple[Part, ...] = ("weights", *MOMENTS)
Read = Callable[[Part, str], Tensor]  # a part of the parameter of this name, fp32 on the CPU


class Engine(Protocol):
    """A model and its optimizer, in one worker or in a group of workers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def model(self) -> PreTrainedModel:
        """To be called for forward passes."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """The precision that forward passes and losses run under."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""
        ...

    def step(self, learning_rate: float) -> Tensor | float:
        """Average over micro-batches and workers, clip, update; returns the norm before clipping.

        The norm is not finite where the update was left out because of the gradient.
        """
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the workers."""
        ...

    def share(self, number: int) -> int:
        """Rank 0's number, to all workers; called by all."""
        ...

    def gather(self, number: int) -> list[int]:
        """Everyone's number by rank, to all workers; called by all."""
        ...

    def part(self, part: Part) -> dict[str, Tensor]:
        """One part of the state by parameter name, whole, fp32 on the CPU; called by all.

        Rank 0 gets it, the others an empty dict.
        """
        ...

    def restore(self, updates: int, read: Read) -> None:
        """Take over a state after `updates` optimizer steps; called by all."""
        ...

    def close(self) -> None:
        """Let go of the optimizer; nothing else is called after it."""
        ...


class TorchEngine:
    """One process, AdamW."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        device: torch.device,
        weight_decay: float,
        clip: float,
        accumulation: int,
        bfloat16: bool,
    ) -> None:
        self._model = model.to(device)
        self.device, self.clip, self.accumulation, self.bfloat16 = device, clip, accumulation, bfloat16
        self.optimizer = torch.optim.AdamW(
            [weight for _, weight in trained_parameters(model)], lr=0.0, weight_decay=weight_decay, fused=True
        )

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def mean(self, value: Tensor) -> Tensor:
        return value

    def share(self, number: int) -> int:
        return number

    def gather(self, number: int) -> list[int]:
        return [number]

    def part(self, part: Part) -> dict[str, Tensor]:
        return unsharded_part(self._model, self.optimizer, part)

    def restore(self, updates: int, read: Read) -> None:
        restore_unsharded(self._model, self.optimizer, updates, read)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()


def unsharded_part(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part) -> dict[str, Tensor]:
    """A part of the state where every parameter is whole in this process."""

    def of(weight: nn.Parameter) -> Tensor:
        # A parameter that no loss has reached was never updated and has no moments.
        value = weight if part == "weights" else optimizer.state[weight].get(part, torch.zeros_like(weight))
        return value.detach().cpu().contiguous()

    return {name: of(weight) for name, weight in trained_parameters(model)}


@torch.no_grad()
def restore_unsharded(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, read: Read) -> None:
    """The inverse of `unsharded_part`."""
    for name, weight in trained_parameters(model):
        weight.copy_(read("weights", name))
        state = optimizer.state[weight]
        state["step"] = torch.tensor(float(updates), device=weight.device)
        for moment in MOMENTS:
            state[moment] = torch.empty_like(weight).copy_(read(moment, name))
