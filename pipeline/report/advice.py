"""How good predictions of speed are, what to deploy, and whether that held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.planner import Place, cell_of, score
from pipeline.recommend import ModelSize, Recommendation, choices, recommend
from pipeline.report.axes import Axes
from pipeline.report.summary import PredictionScore
from pipeline.report.tables import cell_rows
from pipeline.rows import CellRow, PredictedRow, PromptRow, StepTimes


@dataclass(frozen=True)
class Predictions:
    """What a sweep that predicts leaves beside its rows; all empty where it does not."""

    predicted: Sequence[PredictedRow] = ()
    times: Sequence[StepTimes] = ()
    sizes: Sequence[ModelSize] = ()
    rechecked: Sequence[PromptRow] = ()


def scores(rows: Sequence[PromptRow], predictions: Predictions, axes: Axes) -> list[PredictionScore]:
    """Of every place with cells that were both predicted and measured."""
    found = []
    for place in places(axes):
        here = [row for row in rows if (row.dataset, row.context) == place]
        result = score(here, predictions.times)
        if result is not None:
            found.append(PredictionScore(**place._asdict(), **result._asdict()))
    return found


def recommendations(
    cells: Sequence[CellRow], predictions: Predictions, axes: Axes, samples: int, seed: int
) -> list[Recommendation]:
    """One a place where the sweep predicts, and what the cells in question gave when measured again."""
    if not predictions.predicted:
        return []
    fresh = cell_rows(predictions.rechecked, axes, samples, seed)
    again = {cell_of(cell): cell.speedup for cell in fresh if cell.mode == "measure"}
    found = []
    for place, here in choices(cells, predictions.predicted, axes.least_documents).items():
        advice = recommend(place, here, axes.least_documents)
        best = next((choice for choice in here if choice.basis == "measured"), None)
        found.append(
            advice.model_copy(
                update={
                    "rechecked": again.get(cell_of(advice.choice)) if advice.choice else None,
                    "best_rechecked": again.get(cell_of(best)) if best else None,
                }
            )
        )
    order = places(axes)
    return sorted(found, key=lambda advice: order.index(Place(advice.dataset, advice.context)))


def places(axes: Axes) -> list[Place]:
    return [Place(dataset, context) for dataset in axes.datasets for context in axes.contexts]
