"""The cells of a sweep: which views, γ and thresholds there are, and the rows that tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import Sweep, family
from pipeline.kv import PrefixView, View, view_of
from pipeline.measure import Chance
from pipeline.metrics import repetition_rate
from pipeline.models import ModelRef
from pipeline.replay import Counts
from pipeline.rows import Cell, FailedCell, Prompt, PromptRow

Mode = Literal["replay", "measure"]
# What a cell may end in without ending the others: logits that are not finite, no memory.
CELL_ERRORS = (ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Drafter:
    """A drafter to evaluate, and how many positions it was trained on."""

    name: str
    ref: ModelRef
    trained_positions: int


@dataclass(frozen=True)
class ViewCell:
    """A cell's view and control; the γ, threshold, temperature and seed axes share it."""

    policy: str
    budget: int | Literal["full"]
    control: str | None

    @property
    def view(self) -> View:
        return view_of(self.policy, self.budget)


@dataclass(frozen=True)
class DraftLength:
    """At most γ proposals a round; fewer where the drafter's confidence falls under the threshold."""

    gamma: int
    threshold: float = 0.0


def view_cells(sweep: Sweep) -> list[ViewCell]:
    """The sweep's views, then those of its controls."""
    cells = [ViewCell(policy, budget, None) for policy in sweep.policies for budget in sweep.budgets]
    if "other_prompt" in sweep.controls:
        cells += [ViewCell(c.policy, c.budget, "other_prompt") for c in cells if c.budget != 0]
    if "no_prefix" in sweep.controls:
        cells += [ViewCell(policy, 0, "no_prefix") for policy in sweep.policies]
    return cells


def measured_views(sweep: Sweep) -> list[ViewCell]:
    return [c for c in view_cells(sweep) if not c.control and chosen(c.budget, sweep.measure.budgets)]


def measured_lengths(sweep: Sweep) -> list[DraftLength]:
    return [
        DraftLength(gamma, threshold)
        for gamma in sweep.gammas
        if chosen(gamma, sweep.measure.gammas)
        for threshold in sweep.thresholds
    ]


def chosen(value: object, selection: Sequence[object]) -> bool:
    """Whether a value is in a selection; an empty selection takes everything."""
    return not selection or value in selection


def chosen_drafter(name: str, selection: Sequence[str]) -> bool:
    """As `chosen`; naming a variant takes the drafters of all its seeds."""
    return chosen(name, selection) or family(name) in selection


def make_cell(drafter: Drafter, prompt: Prompt, cell: ViewCell, length: DraftLength, chance: Chance) -> Cell:
    return Cell(
        drafter=drafter.name,
        dataset=prompt.dataset,
        context=prompt.context,
        policy=cell.policy,
        budget=cell.budget,
        control=cell.control,
        gamma=length.gamma,
        threshold=length.threshold,
        temperature=chance.temperature,
        seed=chance.seed,
    )


def make_row(
    mode: Mode,
    cell: Cell,
    drafter: Drafter,
    prompt: Prompt,
    counts: Counts,
    tokens: Sequence[int],
    view: PrefixView,
    looping_rate: float,
) -> PromptRow:
    repetition = repetition_rate(tokens)
    return PromptRow(
        **cell.model_dump(),
        mode=mode,
        prompt_id=prompt.prompt_id,
        document_id=prompt.document_id,
        num_tokens=counts.num_tokens,
        num_rounds=counts.num_rounds,
        num_proposed=counts.num_proposed,
        num_accepted=counts.num_accepted,
        reached=list(counts.reached),
        kept=list(counts.kept),
        repetition_rate=repetition,
        looping=repetition > looping_rate,
        in_trained_range=len(prompt.tokens) + prompt.max_new_tokens <= drafter.trained_positions,
        drafter_kv_bytes=view.num_bytes,
    )


def make_failure(
    mode: Mode,
    sweep: Sweep,
    drafter: Drafter,
    prompt: Prompt,
    error: Exception,
    cell: ViewCell = ViewCell("all", "full", None),
    length: DraftLength = DraftLength(0),
) -> FailedCell:
    """A cell, or where γ is 0 all cells of a view, of one drafter and prompt; by default of all views."""
    given = make_cell(drafter, prompt, cell, length, Chance(0.0, sweep.seeds[0]))
    return FailedCell(
        **given.model_dump(),
        mode=mode,
        prompt_id=prompt.prompt_id,
        error=f"{type(error).__name__}: {error}",
    )
