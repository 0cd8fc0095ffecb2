"""The cells of a sweep: which views, γ and thresholds there are, and the rows that tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from pipeline.config.sweep import Baseline, Sweep, family
from pipeline.decode.replay import Counts
from pipeline.decode.sources import Chance
from pipeline.kv.view_cache import View, view_of
from pipeline.metrics import repetition_rate
from pipeline.models.load import ModelRef
from pipeline.store.rows import Cell, FailedCell, Mode, Prompt, PromptRow

# What a cell may end in without ending the others: logits that are not finite, no memory.
CELL_ERRORS = (ArithmeticError, RuntimeError, MemoryError)
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


class Pick(NamedTuple):
    """What is measured of one drafter."""

    drafter: str
    cell: ViewCell
    length: DraftLength


NOTHING = ViewCell("none", 0, None)  # what prompt lookup keeps of a prefix
ALL_VIEWS, EVERY_LENGTH = ViewCell("all", "full", None), DraftLength(0)  # of a failure that ended them all


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


def configured_picks(sweep: Sweep, drafters: Sequence[Drafter], context: str) -> list[Pick]:
    """The cells that the config names for measuring, of every baseline too."""
    measure = sweep.measure
    return [
        Pick(drafter.name, cell, length)
        for drafter in drafters
        if drafter.baseline or chosen_drafter(drafter.name, measure.drafters)
        for cell in view_cells(sweep, drafter)
        if not cell.control and (cell == NOTHING or chosen(cell.budget, measure.budgets))
        for length in draft_lengths(sweep, context, drafter)
        if chosen(length.gamma, measure.gammas)
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
    kv_bytes: int,
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
        drafter_kv_bytes=kv_bytes,
    )


def make_failure(
    mode: Mode,
    sweep: Sweep,
    drafter: Drafter,
    prompt: Prompt,
    error: Exception,
    cell: ViewCell = ALL_VIEWS,
    length: DraftLength = EVERY_LENGTH,
) -> FailedCell:
    """A cell, or where γ is 0 all cells of a view, of one drafter and prompt; by default of all views.

    Raises:
        AcceleratorError: if that is the error. It leaves the process without its GPU, and every cell after it
            would fail too.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    given = make_cell(drafter, prompt, cell, length, Chance(0.0, sweep.seeds[0]))
    return FailedCell(
        **given.model_dump(),
        mode=mode,
        prompt_id=prompt.prompt_id,
        error=f"{type(error).__name__}: {error}",
    )
