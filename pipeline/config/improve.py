"""The fields of `improve`: rounds of serve, learn, gate, by which a trained drafter gets better."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline.config.gate import GateConfig
from pipeline.config.group import Group


class Improve(Group):
    """What one round serves, learns and must show. More rounds go on from those that are done."""

    drafter: str | None = Field(
        None,
        description="the drafter to begin with, by variant or with its seed; default: the last of "
        "train.variants",
    )
    rounds: int = Field(2, ge=1, description="rounds of serve, learn, gate")
    prompts: int = Field(64, ge=1, description="training prompts that a round serves")
    gamma: int = Field(4, ge=1, le=128, description="proposals of a round of decoding")
    steps: int = Field(100, ge=1, description="optimizer steps of a round")
    kl_steps: int = Field(
        50,
        ge=0,
        description="the first of them, by KL to the target's top-k at every logged position; the others by "
        "cross entropy where a proposal was accepted or was the first to be rejected",
    )
    learning_rate: float | None = Field(None, gt=0, description="peak, AdamW; default: train.learning_rate")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, then cosine to 0")
    gate: GateConfig = Field(
        GateConfig(), description="what a candidate must show, on the validation prompts, to take over"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Improve:
        if self.kl_steps > self.steps:
            raise ValueError(f"kl_steps ({self.kl_steps}) are more than steps ({self.steps})")
        if any(self.gate.temperatures):
            raise ValueError(
                f"gate.temperatures has {max(self.gate.temperatures):g}: rounds are served and judged "
                "greedily, at 0 alone"
            )
        if self.gate.margins.speed is not None:
            raise ValueError("gate.margins.speed: nothing is timed between rounds; leave it out")
        if self.gate.model is not None:
            raise ValueError("gate.model is for the registry, which rounds do not touch: leave it out")
        return self
