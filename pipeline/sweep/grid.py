"""The cells of a sweep: which views, γ and thresholds there are of each draft source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.axes import NOTHING, Baseline, Cell, DrafterKind, Place, View
from pipeline.config.sweep import Sweep
from pipeline.models.load import ModelRef

SELF_POLICIES = ("streaming", "snapkv")


@dataclass(frozen=True)
class Drafter:
    """A draft source to evaluate: a trained model, with the positions it was trained on, or a baseline.

    `ref` is the target's for self-speculation, and None for a source without a model.
    """

    name: str
    ref: ModelRef | None
    trained_positions: int
    baseline: Baseline | None = None

    @property
    def kind(self) -> DrafterKind:
        return self.baseline or "lm"


def views_of(sweep: Sweep, drafter: Drafter) -> list[View]:
    """The views of a drafter, then its controls; a baseline has none of the latter."""
    if drafter.baseline == "self_speculation":
        sparse = [budget for budget in sweep.budgets if budget != "full" and budget > 0]
        return [View(policy, budget) for policy in SELF_POLICIES for budget in sparse]
    if drafter.baseline:
        return [NOTHING]
    views = [View(policy, budget) for policy in sweep.policies for budget in sweep.budgets]
    if "other_prompt" in sweep.controls:
        views += [replace(view, control="other_prompt") for view in views if view.budget != 0]
    if "no_prefix" in sweep.controls:
        views += [View(policy, 0, "no_prefix") for policy in sweep.policies]
    return views


def cells_behind(sweep: Sweep, drafter: Drafter, place: Place, view: View) -> Iterator[Cell]:
    """The greedy cells behind one view, by γ and threshold. Baselines always draft as many as they can."""
    thresholds = (0.0,) if drafter.baseline else sweep.thresholds
    for gamma in sweep.gammas_of(place.context):
        for threshold in thresholds:
            yield Cell(
                drafter=drafter.name,
                dataset=place.dataset,
                context=place.context,
                view=view,
                gamma=gamma,
                threshold=threshold,
                seed=sweep.seeds[0],
                kind=drafter.kind,
            )
