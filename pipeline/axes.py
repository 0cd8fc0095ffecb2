"""The one coordinate of a sweep: what names a cell, and the order of its values."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from pipeline.store.rows import Cell


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


class Place(NamedTuple):
    dataset: str
    context: str


class CellKey(NamedTuple):
    """The fields of `Cell`, as something cheap to hash and to vary."""

    drafter: str
    dataset: str
    context: str
    policy: str
    budget: Budget
    control: str | None
    gamma: int
    threshold: float
    temperature: float
    seed: int

    @staticmethod
    def of(row: Cell) -> CellKey:
        return CellKey(
            row.drafter, row.dataset, row.context, row.policy, row.budget,
            row.control, row.gamma, row.threshold, row.temperature, row.seed,
        )  # fmt: skip


def budget_order(budget: Budget) -> float:
    return math.inf if budget == "full" else budget


def budget_text(budget: Budget) -> str:
    return "the full cache" if budget == "full" else f"B = {budget}"


Budget = int | Literal["full"]
