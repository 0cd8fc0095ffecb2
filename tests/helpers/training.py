"""What is trained in tests: a line, with its schedule and engine, and a variant on windows of labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.train.engine import TorchEngine
from pipeline.train.loop import Schedule
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")
SEQUENCE, WINDOW = 80, 12  # tokens of the labelled sequences, and of the windows of `config_for`
LABELS_K = 6


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


def config_for(variant: dict[str, Any], **train: Any) -> Config:
    """One variant, two windows a sequence."""
    settings = {"batch_sequences": 4, "micro_batch_sequences": 2, "window_tokens": WINDOW, "windows": 2}
    changes = {f"train.{name}": value for name, value in (settings | train).items()}
    top_k = {"data.sequence_tokens": SEQUENCE, "labels.top_k": LABELS_K}
    return tiny_config({**top_k, **changes, "train.variants": [{"name": "v", **variant}]})
