"""The row of a cell on a prompt: its counts, or its error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.axes import Cell, View
from pipeline.config.sweep import Sweep
from pipeline.decode.sampling import Chance
from pipeline.metrics import Counts, Departure, repetition_rate
from pipeline.store.rows import FailedCell, Mode, Prompt, PromptRow, Timing
from pipeline.sweep.grid import Drafter

# Errors that end one cell and not the others: logits that are not finite, no memory.
CELL_ERRORS = (ArithmeticError, RuntimeError, MemoryError)
RECENT = ("streaming", "window")  # policies that keep sinks and the last entries
ALL_VIEWS = View("all", "full")  # of a failure that ended all views


def at_chance(cell: Cell, chance: Chance) -> Cell:
    """The cell at a temperature and seed; cells are made as greedy ones."""
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
    departure: Departure | None = None,
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
        in_trained_range=in_trained_range(drafter, cell.view, prompt),
        drafter_kv_bytes=kv_bytes,
        timing=timing,
        departure=departure,
    )


def in_trained_range(drafter: Drafter, view: View, prompt: Prompt) -> bool:
    """Whether a drafter has seen in training every distance that it meets, its own reading of the prompt
    included.

    That reading is true attention over the whole prompt but for a head, which stores a prefix without any. So
    heads alone gain by what is moved: rebased entries stand as if nothing lay between them; and an offset has
    stood for the distance between sinks and the rest, which is all that longer texts change where the rest
    is recent.
    """
    prefix, trained = len(prompt.tokens), drafter.trained_positions
    if drafter.kind == "head" and view.budget != "full":
        if view.positions == "rebased":
            prefix = min(prefix, view.budget)
        if view.policy in RECENT:
            trained = max(trained, drafter.served_positions)
    return prefix + prompt.max_new_tokens <= trained


def all_cells(sweep: Sweep, drafter: Drafter, prompt: Prompt, view: View = ALL_VIEWS) -> Cell:
    """A stand-in, with γ = 0, for all cells behind a view; by default for those behind every view."""
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
    """The row of a cell, or of `all_cells`, that failed on a prompt.

    Raises:
        AcceleratorError: if that is the error. It leaves the process without its GPU, and every cell after it
            would fail too.
    """
    if isinstance(error, torch.AcceleratorError):
        raise error
    text = f"{type(error).__name__}: {error}"
    return FailedCell(cell=cell, mode=mode, prompt_id=prompt.prompt_id, error=text)
