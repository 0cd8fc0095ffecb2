"""Predicted speed of every cell, and how far predictions are from what was measured.

A round drafts γ tokens, verifies γ + 1 and does the rest; replay knows exactly how many rounds a text takes:

    decode seconds of a prompt = rounds · (γ · draft(B) + verify(γ + 1, context) + rest)

with step times from `step_times.py`. A source without a model proposes in one step, and verifies two tokens
where it has nothing to propose. Predicted and measured speed never share a field.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from pipeline import intervals
from pipeline.axes import BASELINES, MODEL_FREE, Cell
from pipeline.store.rows import PredictedRow, PromptRow, StepTimes


class StepModel:
    """Step times by context, kind of draft source, and view."""

    def __init__(self, times: Sequence[StepTimes]) -> None:
        self.times = {
            (t.context, t.kind, t.policy if t.kind in BASELINES else "", t.budget): t for t in times
        }
        # Verifying depends on the target alone: the median over all sources that always propose γ tokens.
        self.verify_s: dict[str, dict[int, float]] = {}
        for context in {t.context for t in times}:
            here = [t.verify_s for t in times if t.context == context and t.kind not in MODEL_FREE]
            gammas = sorted({gamma for verify_s in here for gamma in verify_s})
            self.verify_s[context] = {g: median(v[g] for v in here if g in v) for g in gammas}

    def of(self, cell: Cell) -> StepTimes | None:
        """None where no step of such a view was timed."""
        baseline = cell.drafter in BASELINES
        kind, policy = (cell.drafter, cell.view.policy) if baseline else ("drafter", "")
        return self.times.get((cell.context, kind, policy, cell.view.budget))

    def verify(self, context: str, proposals: int) -> float:
        """Seconds of verifying so many proposals and the token before them."""
        known = self.verify_s[context]
        return float(np.interp(proposals, list(known), list(known.values())))

    def seconds(self, row: PromptRow) -> float | None:
        """Predicted decode seconds of a replayed prompt."""
        cell, rounds = row.cell, row.counts.num_rounds
        times = self.of(cell)
        if times is None or not self.verify_s[cell.context]:
            return None
        verify_s = self.verify(cell.context, cell.gamma)
        if cell.drafter in MODEL_FREE:
            hits = row.counts.reached[0]
            verifying = hits * verify_s + (rounds - hits) * self.verify(cell.context, 1)
            return verifying + rounds * (times.draft_s + times.round_s)
        return rounds * (cell.gamma * times.draft_s + verify_s + times.round_s)


def mean_step_times(times: Iterable[StepTimes]) -> list[StepTimes]:
    """For each view, the means over all timings of its steps.

    Each timing consists of medians already. Several are averaged, since what was measured between them is
    summed up too, with the times when the machine was slower.
    """
    views: dict[tuple[object, ...], list[StepTimes]] = defaultdict(list)
    for timed in times:
        views[timed.context, timed.kind, timed.policy, timed.budget].append(timed)
    return [
        timings[0].model_copy(
            update={
                "verify_s": {g: fmean(timed.verify_s[g] for timed in timings) for g in timings[0].verify_s},
                **{
                    name: fmean(getattr(timed, name) for timed in timings)
                    for name in ("draft_s", "round_s", "ar_s")
                },
            }
        )
        for timings in views.values()
    ]


def predict(
    rows: Iterable[PromptRow], times: Sequence[StepTimes], samples: int, seed: int
) -> list[PredictedRow]:
    """Speed of every cell that was replayed exactly: greedy, without control and threshold."""
    step_model = StepModel(times)
    cells: dict[Cell, list[PromptRow]] = defaultdict(list)
    for row in rows:
        if row.mode == "replay" and row.cell.control is None and not row.cell.threshold:
            cells[row.cell].append(row)
    predicted = []
    for cell, prompts in cells.items():
        known = step_model.of(cell)
        seconds = [s for row in prompts if (s := step_model.seconds(row)) is not None]
        if known is None or len(seconds) < len(prompts):
            continue
        speedup = intervals.bootstrap_interval(
            [row.counts.num_tokens * known.ar_s for row in prompts],
            seconds,
            samples=samples,
            seed=seed,
            clusters=[row.document_id for row in prompts],
        )
        predicted.append(
            PredictedRow(
                cell=cell,
                num_prompts=len(prompts),
                num_documents=len({row.document_id for row in prompts}),
                decode_s=sum(seconds) / len(prompts),
                speedup=speedup,
            )
        )
    return predicted


class Error(NamedTuple):
    """predicted ÷ measured − 1 of a cell's decode time, over the prompts that were measured.

    `relative` counts both times in autoregressive steps: the predicted time in the steps that were timed with
    the other single steps, the measured time in the steps that ran beside it. `seconds` compares plain
    seconds, so that it includes how much slower or faster the machine was than when single steps were timed.
    `pace` is that factor: the seconds of measured autoregressive steps ÷ those of timed ones.
    """

    relative: float
    seconds: float
    pace: float


class Score(NamedTuple):
    """How far predicted decode times are from measured ones: |predicted ÷ measured − 1| of each cell.

    Both are counted in autoregressive steps, as in `Error`; `median_error_s` is the median of plain
    seconds, and `pace` that of the paces. `bias` is the median of predicted ÷ measured − 1: below 0 where
    predictions are too fast.
    """

    cells: int
    median_error: float
    worst_error: float
    bias: float
    median_error_s: float
    pace: float


def errors(rows: Sequence[PromptRow], times: Sequence[StepTimes]) -> dict[Cell, Error]:
    """The error of every cell that was predicted and measured."""
    step_model = StepModel(times)
    replayed = {(row.cell, row.prompt_id): row for row in rows if row.mode == "replay"}
    pairs: dict[Cell, list[tuple[float, float, float, float]]] = defaultdict(list)
    for row in rows:
        same, timing = replayed.get((row.cell, row.prompt_id)), row.timing
        if same is None or timing is None or row.cell.threshold:
            continue
        known, seconds = step_model.of(row.cell), step_model.seconds(same)
        if known is not None and seconds is not None:
            plain = known.ar_s * timing.ar_num_tokens
            times_of_prompt = (seconds, median(timing.decode_s), plain, median(timing.ar_decode_s))
            pairs[row.cell].append(times_of_prompt)
    errors_by_cell = {}
    for cell, prompts in pairs.items():
        ours, ours_measured, plain, plain_measured = (sum(column) for column in zip(*prompts, strict=True))
        pace = plain_measured / plain
        errors_by_cell[cell] = Error(ours * pace / ours_measured - 1, ours / ours_measured - 1, pace)
    return errors_by_cell


def score(cell_errors: Collection[Error]) -> Score | None:
    if not cell_errors:
        return None
    sizes = [abs(error.relative) for error in cell_errors]
    return Score(
        cells=len(cell_errors),
        median_error=median(sizes),
        worst_error=max(sizes),
        bias=median(error.relative for error in cell_errors),
        median_error_s=median(abs(error.seconds) for error in cell_errors),
        pace=median(error.pace for error in cell_errors),
    )
