"""What the training loop asks of an engine, and the plain torch one. DeepSpeed's is in `jobs/`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

STATE = "state.pt"


class Engine(Protocol):
    """A model, its optimizer and, in a group of workers, the others."""

    name: str
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
        """Average over micro-batches and workers, clip, update; returns the norm before clipping."""
        ...

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the workers."""
        ...

    def save(self, folder: Path) -> None:
        """Write model and optimizer; called by all workers, returns when all have written."""
        ...

    def load(self, folder: Path) -> None: ...

    def state_dict(self, folder: Path) -> dict[str, Tensor]:
        """fp32 weights of the checkpoint that was just saved in `folder`; asked of rank 0 only."""
        ...


class TorchEngine:
    """One process, AdamW."""

    name = "torch"
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
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=weight_decay, fused=True)

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

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"model": self._model.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / STATE
        )

    def load(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        self._model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def state_dict(self, folder: Path) -> dict[str, Tensor]:
        return self._model.state_dict()
