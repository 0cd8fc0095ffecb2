"""The one coordinate of a sweep: a cell, with its view and its place, and the order of their values.

Rows hold a `Cell`; whoever asks for part of it takes its `place` or its `view`. What is at its default is so
in every sweep that does not name it, and in rows that were written before there was such a field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

Budget = int | Literal["full"]
Control = Literal["other_prompt", "no_prefix"]
ModelFree = Literal["prompt_lookup"]  # draft sources without a model; `decode/sources.py` has their classes
Baseline = Literal["self_speculation", ModelFree]  # draft sources that are not trained
DrafterKind = Literal["lm", "first_layers", "head", Baseline, "cascade"]
Positions = Literal["true", "rebased", "anchor_offset"]
AcceptanceRule = Literal["exact", "dropmatch"]
MODEL_FREE: tuple[str, ...] = get_args(ModelFree)
BASELINES: tuple[str, ...] = get_args(Baseline)


def family(drafter: str) -> str:
    """The variant that a drafter belongs to: `multi_view` of `multi_view~43`, trained with seed 43."""
    return drafter.partition("~")[0]


def check_budget(budget: int | str) -> int | str:
    """A budget is "full", 0, or at least 16 and divisible by 8 (the chunk size of `chunk_topk`)."""
    if budget == "full" or budget == 0:
        return budget
    if isinstance(budget, str) or budget < 16 or budget % 8:
        raise ValueError(f'a budget is "full", 0, or an integer of at least 16 divisible by 8, not {budget}')
    return budget


def budget_order(budget: Budget) -> float:
    """Sorts budgets: the whole cache is the largest."""
    return math.inf if budget == "full" else budget


def budget_text(budget: Budget) -> str:
    return "the full cache" if budget == "full" else f"B = {budget}"


class Place(NamedTuple):
    """Where cells compare with one another: a data set at a context."""

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
        positions: where kept entries are taken to stand.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    policy: str
    budget: Budget
    control: Control | None = None
    sinks: int | None = None
    refresh: int | None = None
    positions: Positions = "true"

    @property
    def kept(self) -> View:
        """The same entries under one name: every policy keeps all of "full", and nothing of 0.

        Whose entries they are, a `control` says, so it is not in it.
        """
        if self.budget == "full":
            return FULL
        return replace(self, policy="none" if self.budget == 0 else self.policy, control=None)

    @property
    def name(self) -> str:
        return "full" if self.budget == "full" else f"{self.policy}/{self.budget}"


FULL = View("full", "full")
NOTHING = View("none", 0)  # what a source without a model keeps of a prefix


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a sweep.

    Args:
        drafter: a trained drafter by variant and training seed, or a baseline.
        gamma: γ, `num_draft_tokens`.
        threshold: drafting stops behind a proposal of which the drafter is less sure; 0 always drafts γ.
        temperature: 0 is greedy.
        seed: of sampling.
        kind: what sort of model drafts; a baseline is its own. The drafter's name decides it, so it tells no
            cells apart.
        rule: `exact` is lossless; `dropmatch` is not.
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
        """The cell with other values, those of its view named as its own are."""
        in_view = {name: changes.pop(name) for name in _VIEW & changes.keys()}
        changes.setdefault("view", self.view)
        return replace(self, **changes | {"view": replace(changes["view"], **in_view)})

    @property
    def place(self) -> Place:
        return Place(self.dataset, self.context)

    @property
    def policy(self) -> str:
        return self.view.policy

    @property
    def budget(self) -> Budget:
        return self.view.budget

    @property
    def control(self) -> Control | None:
        return self.view.control


_VIEW = frozenset(one.name for one in fields(View))
