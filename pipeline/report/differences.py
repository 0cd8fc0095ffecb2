"""Paired differences of acceptance: drafter against drafter, and the real prefix against a control.

Both sides are the same prompts, so what makes a prompt easy or hard cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

from pipeline import metrics
from pipeline.report.summary import Budget, ControlGap, Gain
from pipeline.report.tables import Axes, CellKey, PromptRows, accepted_of_proposed
from pipeline.rows import PromptRow

Cells = dict[CellKey, PromptRows]
Pairs = list[tuple[PromptRow, PromptRow]]


@dataclass(frozen=True)
class Resampling:
    samples: int
    seed: int


def gains(cells: Cells, axes: Axes, resampling: Resampling) -> list[Gain]:
    """Every later drafter minus every earlier one, at the smallest budget and at the full cache.

    Each is given over all prompts, without looping prompts, and under the control `other_prompt`: what is
    left of a gain when the context is another document's cannot come from using the context.
    """
    sides: tuple[tuple[str | None, Literal["all", "not_looping"]], ...] = (
        (None, "all"),
        (None, "not_looping"),
        ("other_prompt", "all"),
    )
    budgets: list[Budget] = ["full"] if axes.smallest_budget is None else [axes.smallest_budget, "full"]
    pairs = list(combinations(axes.drafters, 2))
    found = []
    for place, (baseline, drafter), budget, (control, prompts) in product(
        _places(cells), pairs, budgets, sides
    ):
        key = place._replace(drafter=drafter, budget=budget, control=control)
        paired = _paired(cells, key, key._replace(drafter=baseline), prompts == "not_looping")
        if paired:
            found.append(
                Gain(
                    **key._asdict(),
                    **_difference(paired, resampling)._asdict(),
                    num_prompts=len(paired),
                    baseline=baseline,
                    prompts=prompts,
                )
            )
    return sorted(
        found, key=lambda g: (axes.order(g)[:4], axes.drafters.index(g.baseline), axes.order(g)[4:])
    )


def control_gaps(cells: Cells, axes: Axes, resampling: Resampling) -> list[ControlGap]:
    """Real prefix minus control, for every control cell. `no_prefix` is set against the smallest budget."""
    found = []
    for key in cells:
        if key.control is None:
            continue
        budget: Budget | None = axes.smallest_budget if key.control == "no_prefix" else key.budget
        if budget is None:
            continue
        paired = _paired(cells, key._replace(control=None, budget=budget), key, False)
        if paired:
            found.append(
                ControlGap(
                    **key._asdict(),
                    **_difference(paired, resampling)._asdict(),
                    num_prompts=len(paired),
                    real_budget=budget,
                )
            )
    return sorted(found, key=axes.order)


def _places(cells: Cells) -> list[CellKey]:
    """One key for each data set, context, policy, γ, temperature and seed that was swept."""
    return list({key._replace(drafter="", budget=0, control=None): None for key in cells})


def _paired(cells: Cells, first: CellKey, second: CellKey, without_looping: bool) -> Pairs:
    """Rows of the prompts that both cells hold and that propose something."""
    first_rows, second_rows = cells.get(first, {}), cells.get(second, {})
    return [
        (first_rows[prompt], second_rows[prompt])
        for prompt in sorted(first_rows.keys() & second_rows.keys())
        if first_rows[prompt].num_proposed
        and second_rows[prompt].num_proposed
        and not (without_looping and (first_rows[prompt].looping or second_rows[prompt].looping))
    ]


def _difference(paired: Pairs, resampling: Resampling) -> metrics.Interval:
    first, second = zip(*paired, strict=True)
    return metrics.paired_difference(
        accepted_of_proposed(first),
        accepted_of_proposed(second),
        samples=resampling.samples,
        seed=resampling.seed,
    )
