"""The cells of a sweep: which draft sources, views, γ, thresholds and texts there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.axes import (
    MODEL_FREE,
    NOTHING,
    Baseline,
    Budget,
    Cell,
    DrafterKind,
    Place,
    Positions,
    View,
    family,
)
from pipeline.config.schema import Config
from pipeline.config.sweep import Sweep
from pipeline.decode.sampling import Chance
from pipeline.kv.policies import GUIDED, WINDOW
from pipeline.kv.views import placed
from pipeline.models.load import ModelRef

SELF_POLICIES = ("streaming", "snapkv")


@dataclass(frozen=True)
class Drafter:
    """A draft source to evaluate: a trained model, with the positions it was trained on, or a baseline.

    `ref` is the target's for self-speculation and for a cascade, whose small drafter is `inner`; it is None
    for a source without a model. `positions` are those that the drafter, or what drafts within a cascade, was
    trained with; `served_positions` those that its anchor_offset has stood for.
    """

    name: str
    ref: ModelRef | None
    trained_positions: int
    baseline: Baseline | None = None
    trained_kind: DrafterKind = "lm"
    positions: Positions = "true"
    inner: ModelRef | None = None
    served_positions: int = 0

    @property
    def kind(self) -> DrafterKind:
        return self.baseline or self.trained_kind

    @property
    def predictable(self) -> bool:
        """Whether its speed follows from single steps and replay: how often the middle of a cascade is asked
        depends on the text."""
        return self.baseline != "cascade"

    @property
    def role(self) -> Literal["target", "drafter"] | None:
        """The config's model that drafts; a source without a model has none."""
        if self.baseline is None:
            return "drafter"
        return None if self.baseline in MODEL_FREE else "target"


def chosen(value: object, selection: Sequence[object]) -> bool:
    """Whether a value is in a selection; an empty selection takes everything."""
    return not selection or value in selection


def chosen_drafter(name: str, selection: Sequence[str]) -> bool:
    """As `chosen`; the name of a variant selects the drafters of all its seeds."""
    return chosen(name, selection) or family(name) in selection


def draft_sources(config: Config) -> list[Drafter]:
    """The draft sources of a sweep, not yet with their models: trained drafters, then baselines."""
    given = config.drafter.kind
    kind: DrafterKind = given if given in ("first_layers", "head") else "lm"
    trained = [
        Drafter(variant.name, None, 0, trained_kind=kind, positions=variant.positions)
        for variant in config.train.drafters
        if chosen_drafter(variant.name, config.sweep.drafters)
    ]
    baselines = [Drafter(name, None, 0, name) for name in config.sweep.baselines]
    if cascade := config.sweep.cascade:
        placed_as = {variant.name: variant.positions for variant in config.train.drafters}
        within = placed_as[cascade.drafter]
        baselines = [replace(b, positions=within) if b.name == "cascade" else b for b in baselines]
    return trained + baselines


def loaded_drafters(config: Config) -> list[str]:
    """The trained drafters that a sweep loads: those that it evaluates, and that of a cascade."""
    names = [source.name for source in draft_sources(config) if source.role == "drafter"]
    cascade = config.sweep.cascade
    return list(dict.fromkeys([*names, *([cascade.drafter] if cascade else [])]))


def swept(sweep: Sweep, policy: str, budget: Budget) -> View:
    """A view with what its policy asks of the sweep."""
    sinks = sweep.sinks if policy == WINDOW and budget != "full" else None
    refresh = sweep.refresh if policy == GUIDED and budget not in ("full", 0) else None
    return View(policy, budget, sinks=sinks, refresh=refresh)


def views_of(sweep: Sweep, drafter: Drafter) -> list[View]:
    """The views of a drafter, then its controls; a baseline has no controls."""
    if drafter.role == "target":
        sparse = [budget for budget in sweep.budgets if budget != "full" and budget > 0]
        return [View(policy, budget) for policy in SELF_POLICIES for budget in sparse]
    if drafter.baseline:
        return [NOTHING]
    views = [
        placed(swept(sweep, policy, budget), drafter.positions)
        for policy in sweep.policies
        for budget in sweep.budgets
    ]
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


def cells_at(sweep: Sweep, drafter: Drafter, place: Place) -> Iterator[Cell]:
    """All greedy cells of a drafter in a place, view by view."""
    for view in views_of(sweep, drafter):
        yield from cells_behind(sweep, drafter, place, view)


def texts(sweep: Sweep, temperatures: Iterable[float]) -> list[Chance]:
    """How the texts of one prompt are drawn: one at temperature 0, else one for each seed."""
    return [Chance(t, seed) for t in temperatures for seed in (sweep.seeds if t > 0 else sweep.seeds[:1])]


def can_replay(cell: Cell, chance: Chance) -> bool:
    """Whether replay gives the acceptance of a cell on such a text: with a threshold, on greedy text only."""
    return not (cell.threshold and chance.temperature)
