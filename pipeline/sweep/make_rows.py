"""The rows that tell of a cell on a prompt: counts, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.axes import Cell, View
from pipeline.config.sweep import Sweep
from pipeline.decode.sampling import Chance
from pipeline.metrics import Counts, repetition_rate
from pipeline.store.rows import FailedCell, Mode, Prompt, PromptRow, Timing
from pipeline.sweep.grid import Drafter

# What a cell may end in without ending the others: logits that are not finite, no memory.
CELL_ERRORS = (ArithmeticError, RuntimeError, MemoryError)
ALL_VIEWS = View("all", "full")  # of a failure that ended them all


def at_chance(cell: Cell, chance: Chance) -> Cell:
    """The cell as it is sampled; cells are made as greedy ones."""
    return replace(cell, temperature=chance.temperature, seed=chance.seed)


def make_row(
    mode: Mode,
    cell: Cell,
    drafter: Drafter,
    prompt: Prompt,
    counts: Counts,
    tokens: Sequence[int],
    kv_bytes: int,
    looping_rate: float,
    num_left_out: int = 0,
    timing: Timing | None = None,
) -> PromptRow:
    repetition = repetition_rate(tokens)
    return PromptRow(
        cell=cell,
        mode=mode,
        prompt_id=prompt.prompt_id,
        document_id=prompt.document_id,
        counts=counts,
        num_left_out=num_left_out,
        repetition_rate=repetition,
        looping=repetition > looping_rate,
        in_trained_range=len(prompt.tokens) + prompt.max_new_tokens <= drafter.trained_positions,
        drafter_kv_bytes=kv_bytes,
        timing=timing,
    )


def all_cells(sweep: Sweep, drafter: Drafter, prompt: Prompt, view: View = ALL_VIEWS) -> Cell:
    """What stands for all cells behind a view, by default for those behind any: γ is 0."""
    return Cell(
        drafter=drafter.name,
        dataset=prompt.dataset,
        context=prompt.context,
        view=view,
        gamma=0,
        seed=sweep.seeds[0],
        kind=drafter.kind,
    )


def make_failure(mode: Mode, cell: Cell, prompt: Prompt, error: Exception) -> FailedCell:
    """What became of a cell, or of `all_cells`, on a prompt.

    Raises:
        AcceleratorError: if that is the error. It leaves the process without its GPU, and every cell after it
            would fail too.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    text = f"{type(error).__name__}: {error}"
    return FailedCell(cell=cell, mode=mode, prompt_id=prompt.prompt_id, error=text)
