"""What `summary.json` holds: the figures that people and other programs ask for first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.axes import Budget
from pipeline.errors import BadData
from pipeline.intervals import Interval
from pipeline.results.recommend import Recommendation
from pipeline.store import old_rows
from pipeline.store.rows import ModelSize, OfCell, Row


class Estimate(OfCell):
    """One cell's acceptance or speedup with its 95 % interval.

    `num_documents` is how many units the interval resamples. Of a speedup, documents whose prompts were
    decoded together count as one: they share a clock.
    """

    value: Interval
    num_prompts: int
    num_documents: int


class Gain(Estimate):
    """Acceptance of the cell's drafter minus that of `baseline` in the same cell, over the same prompts.

    Under a control `lost` is the gain with the real prefix minus this one, with its interval, over the
    prompts that all four cells hold: the part of the gain that needs the real prefix.
    """

    baseline: str
    prompts: Literal["all", "not_looping"]
    lost: Interval | None = None


class FamilyGain(Gain):
    """A gain of one variant over another, both trained with the same seeds: the mean over these seeds.

    Its cell and `baseline` name variants; `by_seed` has each training seed's gain, as the config lists them.
    The interval resamples documents and training seeds.
    """

    num_seeds: int
    by_seed: list[float]


class ControlGap(Estimate):
    """Acceptance with the real prefix minus that of this control cell, same drafter and prompts.

    `real_budget` is that of the real prefix; it differs from the cell's for `no_prefix`, whose own is 0.
    """

    real_budget: Budget


class ArSpeed(Row):
    """Tokens per second of autoregressive decoding, pooled over all measured cells of a place.

    `num_documents` as in `Estimate`: those whose prompts were decoded together count as one.
    """

    dataset: str
    context: str
    temperature: float
    speed: Interval
    num_prompts: int
    num_documents: int

    @model_validator(mode="before")
    @classmethod
    def _as_today(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "mean" not in data:
            return data
        row = dict(data)
        return {"speed": old_rows.take(row, old_rows.PARTS), **row}


class Lossless(Row):
    """Greedy prompts of measured cells, and those that equal AR token for token in all of them.

    Of the others, `explained` depart from AR only where the target's two best logits are closer than its
    logits' noise. The tokens from there on, `left_out_tokens` over all cells, count towards no acceptance.
    """

    prompts: int
    exact: int
    explained: int
    left_out_tokens: int


class ReplayCheck(Row):
    """Greedy prompts of cells that were both replayed and decoded, and those with equal counts.

    Compared are rounds, accepted tokens at every draft position, and proposals where replay knows them.
    """

    rows: int
    equal: int


class PredictionScore(Row):
    """How far predicted decode times are from measured ones, cell by cell: |predicted ÷ measured − 1|.

    Both are counted in autoregressive steps that were timed beside them, so that it does not matter if the
    machine got slower in between; `median_error_s` compares plain seconds, and `pace` says how much slower
    the machine got. `bias` is the median with its sign, below 0 where predictions are too fast. `what` is
    "plane": the cells that are measured to score predictions, by single steps that were timed between their
    prompts; "plane by earlier steps": the same cells, by the steps that all speeds were predicted from; or
    "other cells": by these earlier steps too, many of the cells having been picked for their predictions.
    """

    what: str
    dataset: str
    context: str
    cells: int
    median_error: float
    worst_error: float
    bias: float
    median_error_s: float
    pace: float


class Stage(Row):
    """One stage of the present run; seconds are this run's, so a cached stage takes almost none."""

    name: str
    seconds: float
    cached: bool


class RankMemory(Row):
    """Peak bytes of each rank that trained a model: of its GPU, or on a CPU of its process."""

    model: str
    ranks: list[int]


class Coverage(Row):
    """The share of the target's tokens in a place that a draft vocabulary V_d holds.

    Of texts that were sampled at `temperature` the share estimates the mass p(V_d) along them.
    """

    dataset: str
    context: str
    share: float
    tokens: int
    temperature: float = 0.0


class Check(Row):
    """A goal: the value that was reached, the target in words, and whether it was met (None: not measured).

    `low` and `high` are the value's 95 % interval, where it has one.
    """

    row: str
    value: float | None
    low: float | None = None
    high: float | None = None
    target: str
    met: bool | None
    note: str = ""


class Summary(Row):
    """`summary.json`. All acceptance figures are shares, intervals are 95 % over documents.

    `compile_s` is what compiling for the measured cells took, outside all timings. `config` is the name of
    the config of the present run, `prepared` the folder of its prepared data as seen from the report's.
    """

    config: str = ""
    prepared: str = ""
    stages: tuple[Stage, ...] = ()
    lossless: Lossless
    replay_check: ReplayCheck
    acceptance: list[Estimate]
    speedup: list[Estimate]
    compile_s: float
    ar_tokens_per_s: list[ArSpeed]
    headline: list[Gain]
    families: list[FamilyGain]
    controls: list[ControlGap]
    checks: tuple[Check, ...] = ()
    contexts: dict[str, int] = Field(default={}, description="context → prompt tokens")
    max_new_tokens: int = 0
    least_documents: int = 2
    models: tuple[ModelSize, ...] = ()
    training_memory: tuple[RankMemory, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    prediction: tuple[PredictionScore, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    findings: list[str]

    @field_validator("prediction", mode="before")
    @classmethod
    def _of_today(cls, scores: Any) -> Any:
        """Drop scores that were written before there was a pace: their errors compare other clocks."""
        if not isinstance(scores, list):
            return scores
        return [score for score in scores if not (isinstance(score, dict) and "pace" not in score)]


def read_summary(file: Path) -> Summary:
    """Raises BadData if the file is cut off or of another version."""
    try:
        return Summary.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            what = f"is not whole ({first['msg']})"
        else:
            what = f"was not written by this version ({error.error_count()} fields differ)"
        raise BadData(f"{file} {what}: run the stage report again") from None
