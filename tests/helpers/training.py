"""The smallest thing that trains: a line, its schedule and its engine."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.train.engine import TorchEngine
from pipeline.train.loop import Schedule
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")


class Line:
    """A loss that pulls every weight towards 1, and at some steps is not finite."""

    tokens_per_micro = 1

    def __init__(self, bad_steps: tuple[int, ...] = ()) -> None:
        self.bad_steps = bad_steps

    def loss(self, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        value = torch.stack([(weight - 1).square().mean() for weight in model.parameters()]).mean()
        value = value * (math.nan if step in self.bad_steps else 1.0)
        return value, {"line": value}

    def name_batch(self, step: int, micro: int) -> str:
        return f"row {micro} of step {step}"

    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        return {}


def schedule_for(steps: int, **train: Any) -> Schedule:
    config = tiny_config({f"train.{name}": value for name, value in train.items()})
    return Schedule(config.train, config.train, steps)


def torch_engine(model: PreTrainedModel, schedule: Schedule) -> TorchEngine:
    return TorchEngine(
        model,
        device=CPU,
        weight_decay=schedule.weight_decay,
        clip=schedule.clip,
        accumulation=schedule.micro_batches,
        bfloat16=False,
    )
