"""The coordinates of a sweep: a cell, with its view and its place, and the order of their values.

Rows hold a `Cell`; code that needs a part of it takes its `place` or its `view`. A field has its default in
every sweep that does not name the field, and in rows that were written before the field existed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

CHUNK = 8  # tokens that policies choose together; `kernels/reference.py` has it too, but needs torch
Budget = int | Literal["full"]
Control = Literal["other_prompt", "no_prefix"]
ModelFree = Literal["prompt_lookup"]  # draft sources without a model; `decode/sources.py` has their classes
Baseline = Literal["self_speculation", "cascade", ModelFree]  # draft sources that are not trained themselves
DrafterKind = Literal["lm", "first_layers", "head", Baseline]
Positions = Literal["true", "rebased", "anchor_offset"]
AcceptanceRule = Literal["exact", "dropmatch"]
MODEL_FREE: tuple[str, ...] = get_args(ModelFree)
BASELINES: tuple[str, ...] = get_args(Baseline)


def kept_positions(config: object) -> Positions:
    """Where a drafter finds what is kept, as its training has written into its model's config."""
    found: Positions = getattr(config, "kept_positions", "true")
    return found


def family(drafter: str) -> str:
    """The variant that a drafter belongs to: `multi_view` of `multi_view~43`, trained with seed 43."""
    return drafter.partition("~")[0]


def check_budget(budget: int | str) -> int | str:
    """A budget is "full", 0, or at least 16 and divisible by 8 (the chunk size of `chunk_topk`)."""
    if budget == "full" or budget == 0:
        return budget
    if isinstance(budget, str) or budget < 16 or budget % CHUNK:
        raise ValueError(f'a budget is "full", 0, or an integer of at least 16 divisible by 8, not {budget}')
    return budget


def budget_order(budget: Budget) -> float:
    """Sorts budgets: the whole cache is the largest."""
    return math.inf if budget == "full" else budget


def budget_text(budget: Budget) -> str:
    return "the full cache" if budget == "full" else f"B = {budget}"


class Place(NamedTuple):
    """A data set at a context: cells are compared with one another within a place."""

    dataset: str
    context: str


@dataclass(frozen=True, slots=True)
class View:
    """What a drafter sees of a prefix.

    Args:
        policy: the rule that picks the kept entries.
        budget: the most entries that it keeps per layer and KV head; of the policy `window` its width W.
        control: `other_prompt` has the kept entries of another document in their place, `no_prefix` has none.
        sinks: S of a window; None where the policy has no such choice.
        refresh: after how many rounds the entries are chosen again; None is never.
        positions: where the kept entries stand. The drafter decides it, as it was trained, so views are not
            compared by it.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    policy: str
    budget: Budget
    control: Control | None = None
    sinks: int | None = None
    refresh: int | None = None
    positions: Positions = field(default="true", compare=False)

    @property
    def kept(self) -> View:
        """The view named by its entries alone: at "full" every policy keeps all of them, at 0 none.

        `control` is left out: it says whose entries they are, not which.
        """
        if self.budget == "full":
            return FULL
        return replace(self, policy="none" if self.budget == 0 else self.policy, control=None)

    @property
    def name(self) -> str:
        return "full" if self.budget == "full" else f"{self.policy}/{self.budget}"


def extras_text(view: View) -> str:
    """What a view has beside its policy and budget, for people; often nothing."""
    sinks = f", {view.sinks} of them sinks" if view.sinks else ""
    again = f", chosen again after every {view.refresh} rounds" if view.refresh else ""
    return sinks + again


def view_text(view: View) -> str:
    """A view for people."""
    return f"{view.policy}, B = {view.budget}{extras_text(view)}"


FULL = View("full", "full")
NOTHING = View("none", 0)  # what a source without a model keeps of a prefix


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a sweep.

    Args:
        drafter: a trained drafter by variant and training seed, or a baseline.
        gamma: γ, `num_draft_tokens`.
        threshold: drafting stops behind a proposal with less confidence than this; 0 always drafts γ tokens.
        temperature: 0 is greedy.
        seed: of sampling.
        kind: what sort of model drafts; a baseline is a kind of its own. The drafter's name decides the kind,
            so cells are not compared by it.
        rule: by which proposals are accepted. `exact` gives the target's own text; `dropmatch` is lossy,
            measured only, and kept apart from all that is said of exact cells.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    drafter: str
    dataset: str
    context: str
    view: View
    gamma: int
    threshold: float = 0.0
    temperature: float = 0.0
    seed: int = 0
    kind: DrafterKind = field(default="lm", compare=False)
    rule: AcceptanceRule = "exact"

    def vary(self, **changes: Any) -> Cell:
        """A copy with other values; a field of the view is named like a field of the cell."""
        in_view = {name: changes.pop(name) for name in _VIEW & changes.keys()}
        changes.setdefault("view", self.view)
        return replace(self, **changes | {"view": replace(changes["view"], **in_view)})

    @property
    def place(self) -> Place:
        return Place(self.dataset, self.context)

    @property
    def lossy(self) -> bool:
        """Whether the text is another than the target's own."""
        return self.rule != "exact"

    @property
    def policy(self) -> str:
        return self.view.policy

    @property
    def budget(self) -> Budget:
        return self.view.budget

    @property
    def control(self) -> Control | None:
        return self.view.control


_VIEW = frozenset(part.name for part in fields(View))
