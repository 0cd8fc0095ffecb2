"""The sizes of a config's models, counted on models without weights: built from their configs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.models.build import build_random, prepare_model
from pipeline.models.heads.begin import head_config
from pipeline.models.heads.eagle import FeatureHead
from pipeline.models.hub import config_here
from pipeline.models.layers import freeze_around_layers, keep_layers, trained_parameters
from pipeline.models.load import model_ref, read_config

if TYPE_CHECKING:
    from pipeline.config.models import Role
    from pipeline.config.schema import Config
    from pipeline.hardware import Device


class Reading(NamedTuple):
    """Tokens that a model reads, each attending to so many; `training` is with a backward pass."""

    role: Role
    tokens: float
    attended: float
    training: bool = False


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
    itemsize: int = 4
    frozen: int = 0
    proposable: int | None = None  # tokens of a draft vocabulary
    features: int = 0  # width of the target's hidden states that a head reads
    heads: int = 1  # of queries

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

    @property
    def reading_bytes(self) -> int:
        """What one token needs in the layer that is being computed without gradients."""
        widest = max(3 * self.intermediate, 4 * self.query + 3 * self.kv)
        return self.itemsize * (2 * self.hidden + widest)

    def prefill_bytes(self, rows: int, prefix: int, chunk: int, device: Device) -> int:
        """The hidden states and the KV of one layer, and the activations of a chunk."""
        alive = rows * prefix * (self.hidden + 2 * self.kv) * self.itemsize
        alive += rows * min(prefix, chunk) * self.reading_bytes
        return device.held(alive, rows * prefix * max(self.hidden, 2 * self.kv) * self.itemsize)

    def training_bytes(self, bfloat16: bool) -> int:
        """What one token leaves in one layer for its backward pass.

        Of each norm: its input, the normalised input and the result, which the projections keep. Of the
        attention: rotated queries and keys, values, its result. Of the MLP: gate, its activation, up, their
        product. Under autocast the norms' fp32 stays and what projections read is kept in bfloat16.
        """
        norms, rest = 6 * self.hidden, 2 * self.query + 2 * self.kv + 4 * self.intermediate
        return 20 * self.hidden + 2 * rest if bfloat16 else 4 * (norms + rest)

    def forward_flops(self, tokens: float, attended: float) -> float:
        """2 a parameter for every token, and 4 a query channel for every token that a token attends to."""
        used = self.parameters - self.hidden * (self.vocab - self.logits)
        return tokens * (2 * used + 4 * self.layers * self.query * attended)


def shapes_of(config: Config, vocab: int) -> dict[Role, Shape]:
    return {role: shape_of(config, role, vocab) for role in config.models}


def shape_of(config: Config, role: Role, vocab: int) -> Shape:
    """A model's shape; a scratch model has `vocab` entries, as the tokenizer has."""
    shape = shape_of_model(outline(config, role, vocab))
    drafts = role == "drafter"
    size = getattr(torch, config.drafter_dtype if drafts else config.target.dtype).itemsize
    # The rows of a draft vocabulary are all that a head has, and lie beside the whole head of other drafters.
    beside = config.train.draft_vocabulary if drafts and config.drafter.kind != "head" else None
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
    features = len(getattr(config, "feature_layers", ())) * getattr(config, "target_hidden_size", 0)
    more = {"frozen": parameters - trained, "features": features, "heads": heads}
    return Shape(parameters, layers, hidden, heads * width, kv, inner, vocab, **more)


def outline(config: Config, role: Role, vocab: int) -> PreTrainedModel:
    """A model as it is trained: its layers, its config, and which of its weights are frozen.

    Args:
        vocab: entries of the tokenizer, which a scratch model has as well.

    Raises:
        BadData: if a pretrained model's config.json is not on this machine, or cannot be read.
    """
    spec = config.models[role]
    base = config.target if role == "target" else config.drafter_base
    with torch.device("meta"):
        if base.kind == "scratch":
            model = build_random(base, vocab)
        else:
            of: Role = role if spec is base else "target"
            given = read_config(model_ref(base, None, of), config_here(base, of))
            model = AutoModelForCausalLM.from_config(given, trust_remote_code=base.trust_remote_code)
        if spec.kind == "first_layers":
            return freeze_around_layers(keep_layers(model, spec.layers))
        if spec.kind == "head":
            whole = model.config.get_text_config(decoder=True).vocab_size
            proposable = config.train.draft_vocabulary or whole
            target = prepare_model(model, vocab)
            return FeatureHead(head_config(target, proposable, spec.feature_layers, **spec.options))
    return model
