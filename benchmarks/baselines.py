"""Hugging Face `generate` as it is: plain, with a static cache and compiled, and assisted by a drafter."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel


@dataclass
class Clock:
    """A streamer that notes when tokens come; the prompt comes first."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        pass

    def seconds_per_token(self) -> float:
        """Counted after the first tokens, so that neither prefill nor the first round counts."""
        return (self.times[-1] - self.times[1]) / sum(self.counts[2:])


def huggingface(model: PreTrainedModel) -> PreTrainedModel:
    """A copy under transformers' own attention, that never stops by itself."""
    config = copy.deepcopy(model.config)
    twin = type(model)._from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    twin.load_state_dict(model.state_dict())
    twin.generation_config.eos_token_id = None
    twin.generation_config.pad_token_id = 0
    return twin.eval().to(model.device)


def generate(
    model: PreTrainedModel, prompt_1S: Tensor, new_tokens: int, compiled: bool = False, **more: Any
) -> tuple[list[int], float]:
    """Greedy tokens, and decode seconds a token."""
    if compiled:
        more |= {"cache_implementation": "static", "compile_config": compile_everywhere()}
    clock = Clock()
    output = model.generate(
        prompt_1S,
        attention_mask=torch.ones_like(prompt_1S),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **more,
    )
    return output[0, prompt_1S.shape[1] :].tolist(), clock.seconds_per_token()


def assisted(
    model: PreTrainedModel, drafter: PreTrainedModel, prompt_1S: Tensor, new_tokens: int, gamma: int
) -> tuple[list[int], float]:
    """Greedy tokens, and decode seconds a token, with γ proposals in every round."""
    settings = drafter.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = gamma, "constant"
    settings.assistant_confidence_threshold = 0.0
    return generate(model, prompt_1S, new_tokens, assistant_model=drafter)


def compile_everywhere() -> CompileConfig:
    """Settings that compile on every device; by default transformers compiles on accelerators only."""
    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True
    return config
