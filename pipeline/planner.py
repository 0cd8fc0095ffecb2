"""Predicted speed of every cell, what is worth measuring, and which cell to deploy.

A round drafts γ tokens, verifies γ + 1 and does the rest; how many rounds a text takes, replay knows exactly:

    decode seconds of a prompt = rounds · (γ · draft(B) + verify(γ + 1, context) + rest)

with step times from `calibrate.py`. Predicted and measured speed never share a field.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple, get_args

import numpy as np

from pipeline import metrics
from pipeline.cells import DraftLength, Pick, ViewCell
from pipeline.config import Baseline, Sweep
from pipeline.rows import Cell, PredictedRow, PromptRow, StepTimes

BASELINES = get_args(Baseline)
BEST_PREDICTED = 3  # cells of a data set and context that are measured for being the fastest by prediction


class Place(NamedTuple):
    dataset: str
    context: str


class Clockwork:
    """Step times by context, kind of draft source, and view."""

    def __init__(self, times: Iterable[StepTimes]) -> None:
        self.times = {
            (t.context, t.kind, t.policy if t.kind in BASELINES else "", t.budget): t for t in times
        }

    def of(self, cell: Cell) -> StepTimes | None:
        """None where no step of such a view was timed."""
        baseline = cell.drafter in BASELINES
        kind, policy = (cell.drafter, cell.policy) if baseline else ("drafter", "")
        return self.times.get((cell.context, kind, policy, cell.budget))

    def seconds(self, row: PromptRow) -> float | None:
        """Predicted decode seconds of a replayed prompt."""
        times = self.of(row)
        if times is None:
            return None
        gammas = sorted(times.verify_s)
        verify_s = float(np.interp(row.gamma, gammas, [times.verify_s[gamma] for gamma in gammas]))
        return row.num_rounds * (row.gamma * times.draft_s + verify_s + times.round_s)


def predict(
    rows: Iterable[PromptRow], times: Sequence[StepTimes], samples: int, seed: int
) -> list[PredictedRow]:
    """Speed of every cell that was replayed exactly: greedy, without control and threshold."""
    clockwork = Clockwork(times)
    cells: dict[Cell, list[PromptRow]] = defaultdict(list)
    for row in rows:
        if row.mode == "replay" and row.control is None and not row.threshold:
            cells[cell_of(row)].append(row)
    predicted = []
    for cell, prompts in cells.items():
        known = clockwork.of(cell)
        if known is None:
            continue
        seconds = [clockwork.seconds(row) or 0.0 for row in prompts]
        speedup = metrics.bootstrap_interval(
            [row.num_tokens * known.ar_s for row in prompts],
            seconds,
            samples=samples,
            seed=seed,
            clusters=[row.document_id for row in prompts],
        )
        predicted.append(
            PredictedRow(
                **cell.model_dump(),
                num_prompts=len(prompts),
                num_documents=len({row.document_id for row in prompts}),
                decode_s=sum(seconds) / len(prompts),
                speedup=speedup.mean,
                speedup_low=speedup.low,
                speedup_high=speedup.high,
            )
        )
    return predicted


def by_place(rows: Iterable[PredictedRow]) -> dict[Place, list[PredictedRow]]:
    """Fastest first."""
    places: dict[Place, list[PredictedRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.speedup):
        places[Place(row.dataset, row.context)].append(row)
    return dict(places)


def pick_of(cell: Cell) -> Pick:
    view = ViewCell(cell.policy, cell.budget, cell.control)
    return Pick(cell.drafter, view, DraftLength(cell.gamma, cell.threshold))


def worth_measuring(here: Sequence[PredictedRow]) -> list[Cell]:
    """Of one place: the fastest by prediction, each baseline's fastest, the corners of the best plane.

    Args:
        here: predictions of one place, fastest first.
    """
    trained = [row for row in here if row.drafter not in BASELINES]
    chosen = list(trained[:BEST_PREDICTED])
    chosen += [
        next(row for row in here if row.drafter == name) for name in {r.drafter for r in here} & {*BASELINES}
    ]
    if trained:
        best = trained[0]
        plane = [row for row in trained if (row.drafter, row.policy) == (best.drafter, best.policy)]
        budgets = sorted({row.budget for row in plane}, key=lambda b: float("inf") if b == "full" else b)
        gammas = sorted({row.gamma for row in plane})
        corners = {(b, g) for b in (budgets[0], budgets[-1]) for g in (gammas[0], gammas[-1])}
        chosen += [row for row in plane if (row.budget, row.gamma) in corners]
    return list(dict.fromkeys(cell_of(row) for row in chosen))


def plane_picks(sweep: Sweep, place: Place, drafters: Sequence[str]) -> list[Pick]:
    """The plane that scores predictions, where this is its place: every budget and γ of one drafter."""
    plane = sweep.measure.plane
    if plane is None or (plane.dataset, plane.context) != place:
        return []
    name = next(d for d in drafters if d == plane.drafter or d.startswith(f"{plane.drafter}~"))
    return [
        Pick(name, ViewCell(sweep.policies[0], budget, None), DraftLength(gamma))
        for budget in sweep.budgets
        for gamma in sweep.gammas_of(place.context)
    ]


class Score(NamedTuple):
    """How far predicted decode times are from measured ones: |predicted ÷ measured − 1| of each cell."""

    cells: int
    median_error: float
    worst_error: float


def score(rows: Sequence[PromptRow], times: Sequence[StepTimes]) -> Score | None:
    """Of every cell that was both replayed and measured, over the prompts that were; None where none was."""
    clockwork = Clockwork(times)
    replayed = {(cell_of(row), row.prompt_id): row for row in rows if row.mode == "replay"}
    sums: dict[Cell, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        same = replayed.get((cell_of(row), row.prompt_id))
        seconds = clockwork.seconds(same) if row.mode == "measure" and same and not row.threshold else None
        if seconds is not None:
            total = sums[cell_of(row)]
            total[0] += seconds
            total[1] += median(row.decode_s)
    errors = [abs(predicted / measured - 1) for predicted, measured in sums.values()]
    return Score(len(errors), median(errors), max(errors)) if errors else None


def cell_of(row: Cell) -> Cell:
    """The axes of a row alone, which compare and hash."""
    return Cell(**{name: getattr(row, name) for name in Cell.model_fields})
