"""The rows that tell of a cell on a prompt: counts, or an error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config.sweep import Sweep
from pipeline.decode.sampling import Chance
from pipeline.metrics import Counts, repetition_rate
from pipeline.store.rows import Cell, FailedCell, Mode, Prompt, PromptRow
from pipeline.sweep.grid import Drafter, DraftLength, ViewCell

# What a cell may end in without ending the others: logits that are not finite, no memory.
CELL_ERRORS = (ArithmeticError, RuntimeError, MemoryError)

ALL_VIEWS, EVERY_LENGTH = ViewCell("all", "full", None), DraftLength(0)  # of a failure that ended them all


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
