"""Shapes of models and the memory of a process: what the formulas share. Nothing is loaded.

Sizes are in bytes, and memory is that of one process at its peak. Prefixes are taken to be as long, and views
as many, as they can be. Still the sums are no upper bounds: what allocators and libraries hold beside the
tensors is counted only as far as the constants below say, so that a process may take more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from pipeline.config.models import Head, Role
from pipeline.config.schema import Config
from pipeline.decode.products import LARGE_BYTES
from pipeline.hardware import Device
from pipeline.models.layers import trained_parameters
from pipeline.models.outline import outline

FP32 = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model on which its costs depend. `itemsize` is that of a number where the
    model runs without training; training is in fp32. `frozen` of the parameters are the target's and stay."""

    parameters: int
    layers: int
    hidden: int
    query: int
    kv: int
    intermediate: int
    vocab: int
    itemsize: int = FP32
    frozen: int = 0
    proposable: int | None = None  # tokens of a draft vocabulary

    @property
    def logits(self) -> int:
        """Logits that the head gives at one position."""
        return self.vocab if self.proposable is None else self.proposable

    @property
    def trained(self) -> int:
        return self.parameters - self.frozen

    @property
    def weights(self) -> int:
        head = 0 if self.proposable is None else self.hidden * self.proposable  # its rows, side by side
        return (self.parameters + head) * self.itemsize

    def kv_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens, all layers."""
        return 2 * self.layers * self.kv * tokens * self.itemsize

    def training_bytes(self, bfloat16: bool) -> int:
        """What one token leaves in one layer for its backward pass.

        Of each norm: its input, the normalised input and the result, which the projections keep. Of the
        attention: rotated queries and keys, values, its result. Of the MLP: gate, its activation, up, their
        product. Under autocast the norms' fp32 stays and what projections read is kept in bfloat16.
        """
        norms, rest = 6 * self.hidden, 2 * self.query + 2 * self.kv + 4 * self.intermediate
        return 20 * self.hidden + 2 * rest if bfloat16 else FP32 * (norms + rest)

    def reading_bytes(self) -> int:
        """What one token needs in the layer that is being computed without gradients."""
        widest = max(3 * self.intermediate, 4 * self.query + 3 * self.kv)
        return self.itemsize * (2 * self.hidden + widest)

    def prefill_bytes(self, prefix: int, chunk: int, device: Device) -> int:
        """The hidden states and the KV of one layer, and the activations of a chunk."""
        alive = prefix * (self.hidden + 2 * self.kv) * self.itemsize
        alive += min(prefix, chunk) * self.reading_bytes()
        return device.held(alive, prefix * max(self.hidden, 2 * self.kv) * self.itemsize)

    def forward_flops(self, tokens: float, attended: float) -> float:
        """2 a parameter for every token, and 4 a query channel for every token that a token attends to."""
        used = self.parameters - self.hidden * (self.vocab - self.logits)
        return tokens * (2 * used + 4 * self.layers * self.query * attended)


def packed_bytes(shape: Shape, device: Device) -> int:
    """The second copy of a large model's weights that decoding on a CPU reads (`decode.products`)."""
    large = device.kind == "cpu" and shape.itemsize == FP32 and shape.weights >= LARGE_BYTES
    return shape.weights if large else 0


def shapes_of(config: Config, vocab: int) -> dict[Role, Shape]:
    return {role: shape_of(config, role, vocab) for role in config.models}


def shape_of(config: Config, role: Role, vocab: int) -> Shape:
    """A model's shape; a scratch model has `vocab` entries, as the tokenizer has."""
    shape = shape_of_model(outline(config, role, vocab))
    drafts = role == "drafter"
    size = getattr(torch, config.drafter_dtype if drafts else config.target.dtype).itemsize
    # The rows of a draft vocabulary are all that a head has, and lie beside the whole head of other drafters.
    beside = config.train.draft_vocabulary if drafts and not isinstance(config.drafter, Head) else None
    return replace(shape, itemsize=size, proposable=beside)


def shape_of_model(model: PreTrainedModel) -> Shape:
    config, parameters = model.config, sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for _, weight in trained_parameters(model))
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv = (getattr(config, "num_key_value_heads", None) or heads) * width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layers, hidden = config.num_hidden_layers, config.hidden_size
    vocab = getattr(config, "draft_vocab_size", None) or config.vocab_size  # of a head over features
    frozen = parameters - trained
    return Shape(parameters, layers, hidden, heads * width, kv, inner, vocab, frozen=frozen)


PARTS = ("base", "weights", "gradients", "optimizer", "activations", "logits", "kv")


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one process of a stage, by what they are for. `processes` share the device."""

    stage: str
    base: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    kv: int = 0
    processes: int = 1

    @property
    def each(self) -> int:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total(self) -> int:
        return self.processes * self.each
