"""Paired differences of acceptance: drafter against drafter, and the real prefix against a control.

Both sides are the same prompts, so what makes a prompt easy or hard cancels. A variant that was trained with
several seeds is a family of drafters (`multi_view~42`, `multi_view~43`). Two families are compared seed by
seed, and over all seeds together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

from pipeline import intervals
from pipeline.axes import Budget, Cell, DrafterKind, family
from pipeline.metrics import Number
from pipeline.results.axes import Axes, Cells
from pipeline.results.pool import accepted_of_proposed, documents
from pipeline.results.summary import ControlGap, FamilyGain, Gain
from pipeline.store.rows import PromptRow

# Every gain is given over all prompts, without looping prompts, and under the control `other_prompt`. A gain
# that remains when the context is another document's cannot come from using the context.
OVER: tuple[tuple[str | None, Literal["all", "not_looping"]], ...] = (
    (None, "all"),
    (None, "not_looping"),
    ("other_prompt", "all"),
)


@dataclass(frozen=True)
class Resampling:
    samples: int
    seed: int


def gains(cells: Cells, axes: Axes, resampling: Resampling) -> list[Gain]:
    """Every later drafter minus every earlier one, at the smallest budget and at the full cache.

    Two families are compared by their drafters of the same training seed; where they have no seed in common
    (such as a variant that was trained once), by the first drafter of each.
    """
    families, kinds = _families(cells, axes), _kinds(cells)
    pairs: list[tuple[str, str]] = []
    for earlier, later in combinations(families.values(), 2):
        common = [(earlier[seed], later[seed]) for seed in earlier if seed in later]
        pairs += common or [(next(iter(earlier.values())), next(iter(later.values())))]
    estimates = []
    for place, (baseline, drafter), budget, (control, prompts) in product(
        _places(cells), pairs, _budgets(axes), OVER
    ):
        key = place.vary(drafter=drafter, kind=kinds[drafter], budget=budget, control=control)
        paired = paired_rows(cells, [key, key.vary(drafter=baseline)], prompts == "not_looping")
        if paired:
            estimates.append(
                Gain(
                    cell=key,
                    value=pooled_difference(paired, resampling),
                    **_counts(paired[0]),
                    baseline=baseline,
                    prompts=prompts,
                    lost=lost(cells, [key], [key.vary(drafter=baseline)], resampling),
                )
            )
    return sorted(estimates, key=lambda gain: _gain_order(gain, axes))


def family_gains(cells: Cells, axes: Axes, resampling: Resampling) -> list[FamilyGain]:
    """Every later family minus every earlier one that was trained with at least two of the same seeds.

    Over the prompts that the drafters of all these seeds hold on both sides.
    """
    families, kinds = _families(cells, axes), _kinds(cells)
    estimates = []
    for place, (baseline, variant), budget, (control, prompts) in product(
        _places(cells), combinations(families, 2), _budgets(axes), OVER
    ):
        kind = kinds[next(iter(families[variant].values()))]
        key = place.vary(drafter=variant, kind=kind, budget=budget, control=control)
        first, second = (
            {seed: key.vary(drafter=drafter) for seed, drafter in families[name].items()}
            for name in (variant, baseline)
        )
        seeds = [s for s in first if s in second and first[s] in cells and second[s] in cells]
        if len(seeds) < 2:
            continue
        keys = [side[seed] for side in (first, second) for seed in seeds]
        shared = paired_rows(cells, keys, prompts == "not_looping")
        if not shared:
            continue
        sides = shared[: len(seeds)], shared[len(seeds) :]
        difference = intervals.seeded_difference(
            *(_stacked(side) for side in sides),
            samples=resampling.samples,
            seed=resampling.seed,
            clusters=documents(shared[0]),
        )
        by_seed = [pooled_difference(pair, resampling).mean for pair in zip(*sides, strict=True)]
        estimates.append(
            FamilyGain(
                cell=key,
                value=difference,
                **_counts(shared[0]),
                baseline=baseline,
                prompts=prompts,
                lost=lost(cells, keys[: len(seeds)], keys[len(seeds) :], resampling),
                num_seeds=len(seeds),
                by_seed=by_seed,
            )
        )
    return sorted(estimates, key=lambda gain: _gain_order(gain, axes))


def lost(
    cells: Cells, first: Sequence[Cell], second: Sequence[Cell], resampling: Resampling
) -> intervals.Interval | None:
    """The gain with the real prefix minus the gain under a control, as in `Gain`; None of a real prefix.

    Args:
        first, second: the cells of both sides by training seed, all of one control.
    """
    if first[0].control is None:
        return None
    real = [key.vary(control=None) for key in (*first, *second)]
    paired = paired_rows(cells, [*real, *first, *second], False)
    if not paired:
        return None
    num = len(first)
    here, there, *less = (_stacked(paired[at : at + num]) for at in range(0, 4 * num, num))
    return intervals.seeded_difference(
        here,
        there,
        less=(less[0], less[1]),
        samples=resampling.samples,
        seed=resampling.seed,
        clusters=documents(paired[0]),
    )


def control_gaps(cells: Cells, axes: Axes, resampling: Resampling) -> list[ControlGap]:
    """Real prefix minus control, for every control cell. `no_prefix` is set against the smallest budget."""
    gaps = []
    # A view without a prefix has no sinks, and nothing that is chosen again.
    real = {key.vary(sinks=None, refresh=None): key for key in cells if key.control is None}
    for key in cells:
        if key.control is None:
            continue
        budget: Budget | None = axes.smallest_budget if key.control == "no_prefix" else key.budget
        if budget is None:
            continue
        beside = real.get(key.vary(control=None, budget=budget, sinks=None, refresh=None))
        paired = paired_rows(cells, [beside, key], False) if beside else None
        if paired:
            gaps.append(
                ControlGap(
                    cell=key,
                    value=pooled_difference(paired, resampling),
                    **_counts(paired[0]),
                    real_budget=budget,
                )
            )
    return sorted(gaps, key=lambda gap: axes.order(gap.cell))


def _families(cells: Cells, axes: Axes) -> dict[str, dict[str, str]]:
    """Variant → training seed ("" where it was trained once) → drafter, in the config's order."""
    swept = {key.drafter for key in cells}
    families: dict[str, dict[str, str]] = defaultdict(dict)
    for drafter in axes.drafters:
        if drafter in swept:
            families[family(drafter)][drafter.partition("~")[2]] = drafter
    return families


def _kinds(cells: Cells) -> dict[str, DrafterKind]:
    return {cell.drafter: cell.kind for cell in cells}


def _places(cells: Cells) -> list[Cell]:
    """One cell for each data set, context, policy, γ, temperature and seed that was swept."""
    return list({key.vary(drafter="", budget=0, control=None): None for key in cells})


def _budgets(axes: Axes) -> list[Budget]:
    return ["full"] if axes.smallest_budget is None else [axes.smallest_budget, "full"]


def _gain_order(gain: Gain, axes: Axes) -> tuple[float | str, ...]:
    order = axes.order(gain.cell)
    return (*order[:5], axes.drafter_order(gain.baseline), *order[5:])


def paired_rows(cells: Cells, keys: Sequence[Cell], without_looping: bool) -> list[list[PromptRow]]:
    """Each cell's rows of the prompts in which all of the cells propose something, in the same order.

    Empty where there is no such prompt.
    """
    sides = [cells.get(key, {}) for key in keys]
    prompts = sorted(set.intersection(*(set(side) for side in sides)))
    rows_by_prompt = [[side[prompt] for side in sides] for prompt in prompts]
    return [
        list(rows)
        for rows in zip(
            *(
                rows
                for rows in rows_by_prompt
                if all(row.counts.num_proposed for row in rows)
                and not (without_looping and any(row.looping for row in rows))
            ),
            strict=True,
        )
    ]


def _stacked(side: Iterable[Sequence[PromptRow]]) -> tuple[list[list[Number]], list[list[Number]]]:
    """Accepted and proposed tokens, [K training seeds, N prompts] each."""
    counts = [accepted_of_proposed(rows) for rows in side]
    return [accepted for accepted, _ in counts], [proposed for _, proposed in counts]


def pooled_difference(paired: Sequence[Sequence[PromptRow]], resampling: Resampling) -> intervals.Interval:
    first, second = paired
    return intervals.paired_difference(
        accepted_of_proposed(first),
        accepted_of_proposed(second),
        samples=resampling.samples,
        seed=resampling.seed,
        clusters=documents(first),
    )


def _counts(rows: Sequence[PromptRow]) -> dict[str, int]:
    return {"num_prompts": len(rows), "num_documents": len(set(documents(rows)))}
