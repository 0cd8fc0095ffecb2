"""The training engine over DeepSpeed ZeRO. The only file that imports deepspeed."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from difflib import get_close_matches
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Config
from pipeline.models.layers import trained_parameters
from pipeline.models.load import pick_device
from pipeline.train.engine import MOMENTS, Part, Read, restore_unsharded, unsharded_part
from pipeline.train.loop import Schedule


class DeepSpeedEngine:
    """The training loop's `Engine` over DeepSpeed's; the settings file sets ZeRO stage and offload."""

    def __init__(self, engine: Any, device: torch.device, hosts: dist.ProcessGroup) -> None:
        self.engine, self.device = engine, device
        self.hosts = hosts  # a group of the same workers, for numbers that need not wait for a GPU
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.stage: int = engine.zero_optimization_stage()

    @property
    def model(self) -> PreTrainedModel:
        return self.engine

    def autocast(self) -> AbstractContextManager[object]:
        # DeepSpeed has its own autocast for a whole forward pass; this is for losses and parts of a model.
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
        if self.stage == 0:  # then DeepSpeed clips, but keeps the norm to itself
            gradients = [weight.grad for weight in self.engine.module.parameters() if weight.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self.engine.step()
            return norm
        self.engine.step()
        # If the gradient is not finite, ZeRO skips the update and still has the norm of the step before.
        return math.inf if self.engine.optimizer.overflow else self.engine.get_global_grad_norm()

    def mean(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def share(self, number: int) -> int:
        if self.world_size == 1:
            return number
        shared = torch.tensor([number])
        dist.broadcast(shared, 0, group=self.hosts)
        return int(shared)

    def gather(self, number: int) -> list[int]:
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(numbers, torch.tensor([number]), group=self.hosts)
        return [int(gathered) for gathered in numbers]

    def part(self, part: Part) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.stage == 0:
            return {} if self.rank else unsharded_part(self.engine.module, self.engine.optimizer, part)
        kept = {}
        for name, weight in trained_parameters(self.engine.module):
            if part == "weights":
                value = safe_get_full_fp32_param(weight)
            else:
                value = safe_get_full_optimizer_state(weight, part)
            if self.rank == 0:
                kept[name] = value.cpu().contiguous()
        return kept

    @torch.no_grad()
    def restore(self, updates: int, read: Read) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        if self.stage == 0:
            restore_unsharded(self.engine.module, self.engine.optimizer, updates, read)
            return
        self.make_moments(updates)
        for name, weight in trained_parameters(self.engine.module):
            for moment in MOMENTS:
                self.set_master(weight, read(moment, name), moment)
            value = read("weights", name)
            self.set_master(weight, value)
            with GatheredParameters([weight], modifier_rank=0):  # what forward passes read
                weight.data.copy_(value)

    def make_moments(self, updates: int) -> None:
        """Make moments of this rank's flat share, as the first step of a fresh ZeRO optimizer would."""
        zero = self.engine.optimizer
        shares = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        for share in shares:
            state = zero.optimizer.state[share]
            state["step"] = torch.tensor(float(updates), device=share.device)
            state |= {moment: torch.zeros_like(share) for moment in MOMENTS}
        if self.stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def close(self) -> None:
        """Without this DeepSpeed keeps the model, gradients and moments for as long as the process lives.

        At stage 3 tables of its own keep the model's shards all the same.
        """
        self.engine.destroy()
        del self.engine

    def set_master(self, weight: Any, value: Tensor, moment: Part | None = None) -> None:
        """Set this rank's share of a parameter's fp32 copy, or of a moment, from the whole tensor."""
        from deepspeed import utils

        if self.stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(weight, value)
            else:
                utils.safe_set_full_optimizer_state(weight, value, moment)
            return
        # ZeRO-3 pads a parameter whose size the ranks do not divide; `safe_set_full_…` does not.
        size = weight.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        shard = padded.narrow(0, size * self.rank, size)
        if moment is None:
            utils.safe_set_local_fp32_param(weight, shard)
        else:
            utils.safe_set_local_optimizer_state(weight, shard, moment)


def problem_of_zero(settings: dict[str, Any]) -> str:
    """What DeepSpeed has against ZeRO settings, by field; "" where it takes them."""
    # In a process that does not train, DeepSpeed has nothing to say about accelerators.
    said = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    finally:
        logging.disable(said)
    try:
        DeepSpeedZeroConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] != "extra_forbidden":
            return f"{field} is {json.dumps(first['input'])[:60]}: {first['msg']}"
        names = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        near = get_close_matches(field, names, n=1)
        return f"{field} is no setting of DeepSpeed's" + (f"; did you mean {near[0]}?" if near else "")
    return ""


def deepspeed_engine(
    config: Config, settings: dict[str, Any]
) -> Callable[[PreTrainedModel, Schedule], DeepSpeedEngine]:
    """The function that makes an engine, for one worker of an initialised process group."""
    import deepspeed

    device = pick_device(config.run.device)
    if device.type == "cuda":  # all GPUs of the machine are visible to each of its workers
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        # Compiling the shared-memory operator takes a minute and hangs on a stale lock; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls functions that torch has renamed; its users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
    hosts = dist.new_group(backend="gloo")

    def make(model: PreTrainedModel, schedule: Schedule) -> DeepSpeedEngine:
        optimizer = torch.optim.AdamW(
            [weight for _, weight in trained_parameters(model)],
            lr=0.0,
            weight_decay=schedule.weight_decay,
            fused=True,
        )
        engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            config={
                **settings,
                "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
                "gradient_accumulation_steps": schedule.micro_batches // dist.get_world_size(),
                "gradient_clipping": schedule.clip,
                "zero_force_ds_cpu_optimizer": False,
                "torch_autocast": {"enabled": config.train.dtype == "bfloat16", "dtype": "bfloat16"},
            },
        )
        return DeepSpeedEngine(engine, device, hosts)

    return make
