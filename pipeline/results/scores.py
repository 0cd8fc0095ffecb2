"""How good predictions of speed are, what to deploy, and whether that held when it was measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.axes import Place, family
from pipeline.config.sweep import Plane
from pipeline.results.axes import Axes
from pipeline.results.recommend import Recommendation, choices, recommend
from pipeline.results.summary import PredictionScore
from pipeline.store.rows import CellRow, ModelSize, PredictedRow, PromptRow, StepTimes
from pipeline.sweep.predict import errors, score


@dataclass(frozen=True)
class Predictions:
    """What a sweep that predicts leaves beside its rows; all empty where it does not.

    `rechecked` are the rows of the cells in `run_off`, and those of the cells in `again`. `beside` are steps
    that were timed again while the plane was measured; `times` are those that cells were predicted from.
    """

    predicted: Sequence[PredictedRow] = ()
    times: Sequence[StepTimes] = ()
    sizes: Sequence[ModelSize] = ()
    run_off: Sequence[CellRow] = ()
    again: Sequence[CellRow] = ()
    rechecked: Sequence[Sequence[PromptRow]] = ()
    plane: Plane | None = None
    beside: Sequence[StepTimes] = ()


def scores(rows: Sequence[PromptRow], predictions: Predictions, axes: Axes) -> list[PredictionScore]:
    """Scores of the plane, whose cells were not picked for speed, and of each place's other measured cells.

    The plane is scored twice: by the steps that were timed beside it, and by the earlier steps, as all other
    cells are.
    """
    plane = predictions.plane
    by_earlier_steps = errors(rows, predictions.times) if predictions.times else {}
    by_steps_beside = errors(rows, predictions.beside) if predictions.beside else {}
    scored = []
    for place in places(axes):
        errors_here = {cell: e for cell, e in by_earlier_steps.items() if cell.place == place}
        on_plane = {
            cell
            for cell in errors_here
            if plane
            and (plane.dataset, plane.context) == place
            and plane.drafter in (cell.drafter, family(cell.drafter))
        }
        for what, of_cells in (
            ("plane", [by_steps_beside[cell] for cell in on_plane & by_steps_beside.keys()]),
            ("plane by earlier steps", [errors_here[cell] for cell in on_plane]),
            ("other cells", [errors_here[cell] for cell in errors_here.keys() - on_plane]),
        ):
            result = score(of_cells)
            if result is not None:
                scored.append(PredictionScore(what=what, **place._asdict(), **result._asdict()))
    return scored


def recommendations(cells: Sequence[CellRow], predictions: Predictions, axes: Axes) -> list[Recommendation]:
    """One for every place; none where nothing was measured at all."""
    by_place = choices(cells, predictions.run_off, predictions.again)
    return [
        recommend(place, by_place.get(place, []), axes.least_documents) for place in places(axes) if by_place
    ]


def untimed(cells: Sequence[CellRow], predictions: Predictions) -> dict[str, list[str]]:
    """Context → the drafters that were replayed there and have no predicted speed: no step was timed.

    A cascade is none of them: its speed does not follow from single steps.
    """
    if not predictions.sizes:  # every sweep that predicts writes them
        return {}
    known = {(row.cell.drafter, row.cell.context) for row in predictions.predicted}
    exact = [
        row
        for row in cells
        if row.mode == "replay"
        and row.cell.control is None
        and not row.cell.threshold
        and row.cell.kind != "cascade"
    ]
    untimed_by_context: dict[str, list[str]] = {}
    for drafter, context in dict.fromkeys((row.cell.drafter, row.cell.context) for row in exact):
        if (drafter, context) not in known:
            untimed_by_context.setdefault(context, []).append(drafter)
    return untimed_by_context


def places(axes: Axes) -> list[Place]:
    return [Place(dataset, context) for dataset in axes.datasets for context in axes.contexts]
