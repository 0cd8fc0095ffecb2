"""What transformers calls rope parameters, rule by rule, so that a wrong one shows before any work.

Needed is what a rule cannot do without, also where the model's own config has the same rule. The rest may
come from the model: its base `rope_theta`, and the positions that it was trained on, else its
`max_position_embeddings`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.config.group import CheckedBy, Group

Positive = Annotated[float, Field(gt=0)]
NOT_GIVEN: Any = None  # then it is the model's own or transformers' default, which null is not


class Rope(Group):
    """What every rule takes. Strict, for transformers gets the values as they were given."""

    tag: ClassVar[str] = "rope_type"
    model_config = ConfigDict(strict=True, validate_default=False)

    rope_theta: float = Field(NOT_GIVEN, gt=0, description="base of the wavelengths; default: the model's")
    partial_rotary_factor: float = Field(
        NOT_GIVEN, gt=0, le=1, description="share of a head that is turned; default: the model's"
    )


class Scaled(Rope):
    """Reaches `factor` times as far as the model was trained."""

    factor: float = Field(ge=1, description="how many times as far as the model was trained")


class DefaultRope(Rope):
    rope_type: Literal["default"]


class LinearRope(Scaled):
    rope_type: Literal["linear"]


class DynamicRope(Scaled):
    rope_type: Literal["dynamic"]


class YarnRope(Scaled):
    rope_type: Literal["yarn"]
    original_max_position_embeddings: int = Field(
        NOT_GIVEN, ge=1, description="positions of the first training"
    )
    attention_factor: float | None = Field(None, gt=0, description="multiplies cos and sin; null: by factor")
    beta_fast: float | None = Field(None, gt=0, description="turns above which a frequency stays; null: 32")
    beta_slow: float | None = Field(
        None, gt=0, description="turns below which it is divided by factor; null: 1"
    )
    mscale: float | None = Field(None, ge=0, description="with mscale_all_dim, in place of attention_factor")
    mscale_all_dim: float | None = Field(None, ge=0, description="with mscale")
    truncate: bool = Field(NOT_GIVEN, description="round the two bounds to whole dimensions")

    @model_validator(mode="after")
    def _fast_is_above_slow(self) -> YarnRope:
        fast, slow = self.beta_fast or 32, self.beta_slow or 1
        if fast < slow:
            raise ValueError(
                f"beta_fast is {fast:g} (default: 32), less than beta_slow, {slow:g} (default: 1)"
            )
        return self


class LongRope(Rope):
    rope_type: Literal["longrope"]
    short_factor: list[Positive] = Field(min_length=1, description="a factor for each pair of dimensions")
    long_factor: list[Positive] = Field(
        min_length=1, description="the same beyond original_max_position_embeddings"
    )
    original_max_position_embeddings: int = Field(
        NOT_GIVEN, ge=1, description="positions of the first training"
    )
    factor: float | None = Field(None, ge=1, description="how many times as far as that the model reaches")
    attention_factor: float | None = Field(None, gt=0, description="multiplies cos and sin; null: by factor")


class Llama3Rope(Scaled):
    rope_type: Literal["llama3"]
    low_freq_factor: float = Field(
        gt=0, description="turns in the first training below which a frequency is divided by factor"
    )
    high_freq_factor: float = Field(gt=0, description="turns above which a frequency stays as it is")
    original_max_position_embeddings: int = Field(
        NOT_GIVEN, ge=1, description="positions of the first training"
    )

    @model_validator(mode="after")
    def _high_is_above_low(self) -> Llama3Rope:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor:g}) must be above low_freq_factor "
                f"({self.low_freq_factor:g})"
            )
        return self


AnyRope = Annotated[
    DefaultRope | LinearRope | DynamicRope | YarnRope | LongRope | Llama3Rope,
    Field(discriminator="rope_type"),
]
# Plain values still: they go into transformers' configs, and into the fingerprints of finished stages.
RopeScaling = Annotated[dict[str, Any], CheckedBy(AnyRope)]
