"""The training engine over DeepSpeed ZeRO. The only file that imports deepspeed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import Config
from pipeline.models import pick_device
from pipeline.training import Plan

TAG = "zero"


class DeepSpeedEngine:
    """`pipeline.engine.Engine` over a DeepSpeed engine; the settings file has ZeRO stage and offload."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine, self.device = engine, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.name = f"DeepSpeed ZeRO-{engine.zero_optimization_stage()}"

    @property
    def model(self) -> PreTrainedModel:
        return self.engine

    def autocast(self) -> AbstractContextManager[object]:
        # DeepSpeed enters its own for a whole forward pass; this one is for losses and parts of a model.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.engine.torch_autocast_enabled())

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        # Every micro-batch ends in `step`; DeepSpeed updates at the accumulation boundary only.
        self.pending = True
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            self.pending = False

    def step(self, learning_rate: float) -> Tensor | float:
        assert self.pending, "a step ends a whole batch"
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.engine.zero_optimization_stage() == 0:  # then DeepSpeed clips, but keeps the norm to itself
            gradients = [weight.grad for weight in self.engine.module.parameters() if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.engine.step()
            return norm
        self.engine.step()
        return self.engine.get_global_grad_norm()

    def mean(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=TAG)
        dist.barrier()

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag=TAG)

    def state_dict(self, folder: Path) -> dict[str, Tensor]:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        if self.engine.zero_optimization_stage() == 0:
            return {
                name: value.detach().cpu().float() for name, value in self.engine.module.state_dict().items()
            }
        with redirect_stdout(StringIO()):  # it prints what it finds, line by line
            return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)


def deepspeed_engine(
    config: Config, settings: dict[str, Any]
) -> Callable[[PreTrainedModel, Plan], DeepSpeedEngine]:
    """What makes an engine in each worker of an initialised process group."""
    import deepspeed

    device = pick_device(config.run.device)
    if device.type == "cuda":  # all GPUs of the machine are visible to each of its workers
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        # Compiling the shared-memory operator takes a minute and hangs on a stale lock; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls what torch has renamed; its users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")

    def make(model: PreTrainedModel, plan: Plan) -> DeepSpeedEngine:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=plan.weight_decay, fused=True)
        engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            config={
                **settings,
                "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
                "gradient_accumulation_steps": plan.micro_batches // config.train.num_workers,
                "gradient_clipping": plan.clip,
                "zero_force_ds_cpu_optimizer": False,
                "torch_autocast": {"enabled": config.train.dtype == "bfloat16", "dtype": "bfloat16"},
            },
        )
        return DeepSpeedEngine(engine, device)

    return make
