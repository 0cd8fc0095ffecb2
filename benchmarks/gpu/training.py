"""One training step at a 16K sequence: supervised tokens a second, and the most memory held.

The forward and backward pass of `pipeline.train` without config, labels in memory: a prefill of the sequence,
then windows behind the full view and sparse ones, the fused loss, an update.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks.gpu.decoding import LLAMA_68M, clock
from benchmarks.pairs import random_llama
from benchmarks.rows import Row, interleaved, row
from pipeline.axes import FULL
from pipeline.kv.views import view_of
from pipeline.train.engine import TorchEngine
from pipeline.train.losses import LOSSES, TargetLabels
from pipeline.train.windows import window_scores

MAX_LOGITS_BYTES = 2**28


@dataclass(frozen=True)
class Training:
    """The shapes of a step."""

    device: str = "cuda"
    drafter: dict[str, Any] = field(default_factory=lambda: LLAMA_68M)
    sequences: int = 4
    tokens: int = 16_384
    windows: int = 4
    window: int = 256
    budgets: tuple[int, ...] = (256, 512, 1024, 2048)
    top_k: int = 32
    repeats: int = 10


def training_rows(setting: Training) -> list[Row]:
    """A row of speed for each loss, with the peak memory in its note."""
    device = setting.device
    engine = TorchEngine(
        random_llama(torch.float32, device, **setting.drafter).train(),
        device=torch.device(device), weight_decay=0.01, clip=1.0, accumulation=1, bfloat16=device == "cuda",
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)
    shape = (setting.sequences, setting.tokens)
    tokens_BS = torch.randint(3, engine.model.num_tokens, shape, generator=generator, device=device)
    starts = [setting.tokens - setting.window * (number + 1) for number in range(setting.windows)]
    views = [FULL, *(view_of("chunk_topk", budget) for budget in setting.budgets)]
    supervised = setting.sequences * setting.windows * setting.window
    labels = random_labels(supervised, engine.model.num_tokens, setting.top_k, generator)

    def step(loss: str) -> float:
        began = clock(device)
        with engine.autocast():
            scores = window_scores(engine.model, tokens_BS, starts, setting.window, views, MAX_LOGITS_BYTES)
            total = torch.stack([LOSSES[loss](of_view, labels).mean() for of_view in scores]).mean()
        engine.backward(total)
        engine.step(1e-5)
        return supervised / (clock(device) - began)

    made = []
    for loss in ("cross_entropy", "kl"):
        note = f"{setting.sequences} sequences of {setting.tokens}, {len(views)} views"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speeds = interleaved({loss: lambda loss=loss: step(loss)}, setting.repeats)[loss]  # type: ignore[misc]
        if device == "cuda":
            note += f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        made.append(row(f"GPU training, {loss}", speeds, unit=" supervised tokens/s", note=note))
    return [replace(result, device=device) for result in made]


def random_labels(count: int, vocabulary: int, top_k: int, generator: torch.Generator) -> TargetLabels:
    logits = torch.randn(count, min(vocabulary, 4096), generator=generator, device=generator.device)
    top = logits.log_softmax(-1).topk(top_k, -1)
    return TargetLabels(top.indices[:, 0], top.indices, top.values)
