"""The cells of a sweep: which views, γ and thresholds there are, and the rows that tell of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.config.sweep import Baseline, Sweep
from pipeline.kv.views import View, view_of
from pipeline.models.load import ModelRef

SELF_POLICIES = ("streaming", "snapkv")


@dataclass(frozen=True)
class Drafter:
    """A draft source to evaluate: a trained model, with the positions it was trained on, or a baseline.

    `ref` is the target's for self-speculation, and None for prompt lookup, which has no model.
    """

    name: str
    ref: ModelRef | None
    trained_positions: int
    baseline: Baseline | None = None


class ViewCell(NamedTuple):
    """A cell's view and control; the γ, threshold, temperature and seed axes share it."""

    policy: str
    budget: int | Literal["full"]
    control: str | None

    @property
    def view(self) -> View:
        return view_of(self.policy, self.budget)


class DraftLength(NamedTuple):
    """At most γ proposals a round; fewer where the drafter's confidence falls under the threshold."""

    gamma: int
    threshold: float = 0.0


NOTHING = ViewCell("none", 0, None)  # what prompt lookup keeps of a prefix


def view_cells(sweep: Sweep, drafter: Drafter) -> list[ViewCell]:
    """The views of a drafter, then those of its controls; a baseline has none of the latter."""
    if drafter.baseline == "prompt_lookup":
        return [NOTHING]
    if drafter.baseline == "self_speculation":
        sparse = [budget for budget in sweep.budgets if budget != "full" and budget > 0]
        return [ViewCell(policy, budget, None) for policy in SELF_POLICIES for budget in sparse]
    cells = [ViewCell(policy, budget, None) for policy in sweep.policies for budget in sweep.budgets]
    if "other_prompt" in sweep.controls:
        cells += [ViewCell(c.policy, c.budget, "other_prompt") for c in cells if c.budget != 0]
    if "no_prefix" in sweep.controls:
        cells += [ViewCell(policy, 0, "no_prefix") for policy in sweep.policies]
    return cells


def draft_lengths(sweep: Sweep, context: str, drafter: Drafter) -> list[DraftLength]:
    """Baselines always draft as many tokens as they can."""
    thresholds = (0.0,) if drafter.baseline else sweep.thresholds
    return [DraftLength(gamma, t) for gamma in sweep.gammas_of(context) for t in thresholds]
