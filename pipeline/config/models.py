"""Models in the config: from nothing, or from a folder or the hub."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.group import Group
from pipeline.config.rope import RopeScaling

Dtype = Literal["float32", "bfloat16", "float16"]


class Pretrain(Group):
    """Next-token training of a scratch model on the training split."""

    steps: int = Field(ge=0, description="optimizer steps")
    batch_sequences: int = Field(8, ge=1, description="sequences per step")
    sequence_tokens: int | None = Field(
        None, ge=32, description="tokens of one sequence, a piece of a packed one; default: the whole"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak, AdamW")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    compile: bool = Field(False, description="compile forward pass and loss; for run.executor: inline")
    patience: int | None = Field(
        None,
        ge=1,
        description="points of the validation curve (every train.validate_every steps) without a lower loss "
        "after which training ends; the best point's weights are kept. Default: all steps, the last weights",
    )


class ScratchModel(Group):
    """A Llama that the pipeline builds and pretrains itself."""

    kind: Literal["scratch"]
    layers: int = Field(ge=1)
    hidden: int = Field(ge=16, description="model width")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key/value heads; divides heads")
    intermediate: int = Field(ge=16, description="MLP width")
    max_positions: int = Field(ge=32, description="positions that it is built for")
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = Field(None, description="transformers' rope parameters, e.g. YaRN")
    pretrain: Pretrain
    dtype: Dtype = Field("float32", description="precision it runs in at evaluation")

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchModel:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError("heads must divide hidden, and kv_heads must divide heads")
        if (self.hidden // self.heads) % 2:
            raise ValueError("hidden / heads must be even: rotary embeddings turn pairs")
        self.check_rope("rope_scaling", self.rope_scaling)
        return self

    def check_rope(self, field: str, parameters: RopeScaling | None) -> None:
        """Raises ValueError where rope parameters, those of a field, do not fit the shape of this model."""
        pairs = self.hidden // self.heads // 2
        for name, value in (parameters or {}).items():
            if name == "partial_rotary_factor" and value != 1:
                raise ValueError(f"{field}.{name} is {value:g}, but a scratch model is a Llama: leave it out")
            if name in ("short_factor", "long_factor") and len(value) != pairs:
                raise ValueError(f"{field}.{name} has {len(value)} items: hidden / heads / 2 is {pairs}")


class PretrainedModel(Group):
    kind: Literal["pretrained"]
    path: str = Field(description="hub id or local folder with safetensors")
    revision: str | None = Field(None, description="hub revision; a commit hash makes a run repeatable")
    dtype: Dtype = Field("float32", description="precision it runs in")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    rope_scaling: RopeScaling | None = Field(None, description="replaces the model's rope parameters")
    trained_positions: int | None = Field(
        None, ge=1, description="positions it was trained on, where its config does not say so"
    )

    @property
    def may_be_on_hub(self) -> bool:
        """Whether `path`, where it is no folder, may be owner/name of the hub."""
        return self.path.count("/") == 1 and not self.path.startswith((".", "~", "/"))


class FirstLayers(Group):
    """Layers of the target as a drafter, between the target's own embedding, norm and head, which stay."""

    kind: Literal["first_layers"]
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="0-based layers of the target, ascending, such as [0, 29]"
    )
    dtype: Dtype | None = Field(None, description="precision it runs in at evaluation; default: the target's")

    @model_validator(mode="after")
    def _ascending(self) -> FirstLayers:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: {list(self.layers)} must ascend, each layer once")
        return self


class Head(Group):
    """One layer over the target's hidden states, in the form of EAGLE-3; it begins as the target's last."""

    kind: Literal["head"]
    feature_layers: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        min_length=1,
        description="0-based layers of the target whose inputs the head reads; default: 2, the middle one "
        "and the third from the end, as engines take them",
    )
    norm_before_residual: bool = Field(False, description="the residual is the normed features")
    fc_norm: bool = Field(False, description="norm each layer's features first, as EAGLE-3.1 does")
    norm_output: bool = Field(False, description="feed back normed outputs, as EAGLE-3.1 does")
    dtype: Dtype | None = Field(None, description="precision it runs in at evaluation; default: the target's")

    @property
    def options(self) -> dict[str, bool]:
        """The choices within the form."""
        return {name: getattr(self, name) for name in ("norm_before_residual", "fc_norm", "norm_output")}


Role = Literal["target", "drafter"]
AnyModel = Annotated[ScratchModel | PretrainedModel, Field(discriminator="kind")]
AnyDrafter = Annotated[ScratchModel | PretrainedModel | FirstLayers | Head, Field(discriminator="kind")]
