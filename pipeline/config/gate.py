"""The fields of a gate's config: what a candidate must show before it may replace a baseline."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from pipeline.config.group import Group


class Margins(Group):
    """What may be lost in any one cell, candidate against baseline; below 0 asks for a gain."""

    acceptance: float = Field(
        0.01, gt=-1, lt=1, description="of the acceptance rate, as a fraction: 0.01 is one point"
    )
    speed: float | None = Field(
        None,
        gt=-1,
        lt=1,
        description="of the decode speedup over autoregressive decoding, as a fraction of the baseline's; "
        "null leaves speed out",
    )


class GateConfig(Group):
    """How a candidate is compared with a baseline, and how sure a verdict has to be."""

    model: str | None = Field(None, description="name in the model registry; null: its only model")
    gammas: tuple[Annotated[int, Field(ge=1, le=128)], ...] = Field(
        (4,), min_length=1, description="γ at which every data set, context, policy and budget is compared"
    )
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0,), min_length=1, description="0 compares greedy replay, others the estimates at them"
    )
    margins: Margins = Margins()
    error_rate: float = Field(
        0.025,
        gt=0,
        lt=0.5,
        description="most chance of failing a candidate that loses nothing beyond the margins, over all "
        "cells together; and most chance of passing one that loses more somewhere",
    )
    least_documents: int = Field(20, ge=5, description="documents below which a cell decides nothing")
    bootstrap_samples: int = Field(2000, ge=200, description="resamples of documents")
    seed: int = Field(0, ge=0, description="of the resampling")

    @field_validator("gammas", "temperatures")
    @classmethod
    def _no_value_twice(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("lists a value twice")
        return values
