"""What training behind every window was to reach, beside what it reached.

A *specialist* saw one view of the prefix while it trained: `full_only` the whole cache, `single_64` a window
of 64. That view is its *home*; every other that is swept is away from home.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page_parts import points
from benchmarks.real_study.checks import costs_of_steps, enough, few, judged, looping, own
from benchmarks.real_study.tables import OURS, fastest, leading_gamma
from benchmarks.study.families import BySeed, Column, Families, difference, grouped, rows_of
from benchmarks.study.runs import Study
from benchmarks.study.tables import when
from pipeline.axes import Budget, Place, budget_order, budget_text, family
from pipeline.config.schema import Config
from pipeline.intervals import Interval
from pipeline.metrics import Number
from pipeline.results.recommend import settings_text
from pipeline.results.summary import Check
from pipeline.store.rows import CellRow, PromptRow

LOSS, FIRST, FASTER = 0.02, 0.1, 1.5


@dataclass(frozen=True)
class Grid:
    """The rows of a finished run at the γ that its report leads with, by family of drafters."""

    run: Study
    cells: Families

    @staticmethod
    def of(run: Study) -> Grid:
        return Grid(run, grouped([run], leading_gamma(run)))

    @property
    def budgets(self) -> list[Budget]:
        return sorted(self.run.config.sweep.budgets, key=budget_order)

    @property
    def columns(self) -> list[tuple[Place, float]]:
        """Every place and temperature that has rows of ours."""
        seen = [
            (row.cell.place, row.cell.temperature)
            for row in self.run.rows
            if family(row.cell.drafter) == OURS
        ]
        return list(dict.fromkeys(seen))

    def of_family(
        self, name: str, place: Place, temperature: float, budget: Budget, control: str | None = None
    ) -> BySeed:
        column = Column(budget, temperature, control, context=place.context)
        return rows_of(self.cells, name, place.dataset, column)

    def change(self, ours: str, theirs: str, place: Place, temperature: float, budget: Budget) -> Interval:
        """Acceptance of one family minus another's."""
        ours_by_seed, theirs_by_seed = (
            self.of_family(name, place, temperature, budget) for name in (ours, theirs)
        )
        return difference(ours_by_seed, theirs_by_seed).value

    def use_of_context(self, place: Place, temperature: float, budget: Budget) -> Interval:
        """Acceptance of ours with its own prefix minus that with another document's kept entries."""
        own = self.of_family(OURS, place, temperature, budget)
        return difference(own, self.of_family(OURS, place, temperature, budget, "other_prompt")).value

    def documents(self, place: Place) -> int:
        return len({row.document_id for row in self.run.rows if row.cell.place == place})


def all_checks(heads: Study, layers: Study | None, costs: Path | None) -> list[Check]:
    """
    Args:
        heads: the run of heads, one specialist a window and one trained for all.
        layers: a run of drafters of the target's layers on the same prompts.
        costs: rows of `python -m benchmarks --only real`.
    """
    grid = Grid.of(heads)
    return [
        *own(heads),
        *looping(heads),
        *at_home(grid),
        *away_from_home(grid),
        *(against_layers(grid, Grid.of(layers)) if layers else ()),
        *context(grid),
        *faster(heads),
        *costs_of_steps(costs),
    ]


def homes(config: Config) -> dict[str, Budget]:
    """Every specialist's window, or the full cache."""
    found: dict[str, Budget] = {}
    for variant in config.train.variants:
        if variant.sparse_weight == 0 and config.train.steps_of(variant):
            found[variant.name] = "full"
        elif variant.full_weight == 0 and len(variant.budgets) == 1:
            (found[variant.name],) = variant.budgets
    return found


def at_home(grid: Grid) -> Iterator[Check]:
    """One drafter for every window against each specialist where that one was trained for."""
    for name, budget in homes(grid.run.config).items():
        for place, temperature in grid.columns:
            found = grid.change(OURS, name, place, temperature, budget)
            documents = grid.documents(place)
            yield judged(
                row=f"{OURS} − {name} at home ({budget_text(budget)}), "
                f"{' '.join(place)}, {when(temperature)}",
                value=found,
                target=f"above {-100 * LOSS:g} points by its interval",
                met=enough(documents, found.low > -LOSS),
                note=f"{points(found)} points" + few(documents),
            )


def away_from_home(grid: Grid) -> Iterator[Check]:
    """What each specialist loses to ours where it loses most."""
    for name, home in homes(grid.run.config).items():
        for place, temperature in grid.columns:
            away = {
                budget: grid.change(name, OURS, place, temperature, budget)
                for budget in grid.budgets
                if budget != home
            }
            budget, worst = min(away.items(), key=lambda item: item[1].mean)
            documents = grid.documents(place)
            yield judged(
                row=f"{name} − {OURS} where it loses most, {' '.join(place)}, {when(temperature)}",
                value=worst,
                target=f"below {-100 * LOSS:g} points by its interval",
                met=enough(documents, worst.high < -LOSS),
                note=f"behind {budget_text(budget)}, {points(worst)} points" + few(documents),
            )


def first_of_reached(rows: Sequence[PromptRow]) -> tuple[list[Number], list[Number]]:
    """Rounds that accepted their first proposal, and rounds that had one."""
    return [row.counts.kept[0] for row in rows], [row.counts.reached[0] for row in rows]


def against_layers(heads: Grid, layers: Grid) -> Iterator[Check]:
    """A head against a drafter of the target's layers, both trained for every window, on the same prompts."""
    for place, temperature in heads.columns:
        head, other = (grid.of_family(OURS, place, temperature, "full") for grid in (heads, layers))
        found = difference(head, other, counted=first_of_reached).value
        documents = heads.documents(place)
        yield judged(
            row=f"head − first_layers, first proposals accepted, the full cache, {' '.join(place)}, "
            f"{when(temperature)}",
            value=found,
            target=f"at least {100 * FIRST:g} points by its interval",
            met=enough(documents, found.low >= FIRST),
            note=f"{points(found)} points" + few(documents),
        )
    ours, theirs = ends_of(heads.run), ends_of(layers.run)
    for place, ratio in ours.items():
        if place in theirs:
            yield Check(
                row=f"fastest head ÷ fastest first_layers, end to end, {' '.join(place)}",
                value=ratio / theirs[place],
                target="above 1",
                met=ratio > theirs[place],
                note=f"{ratio:.2f} against {theirs[place]:.2f} times autoregressive decoding",
            )


def measured(run: Study) -> list[CellRow]:
    """Measured cells of ours."""
    return [row for row in run.cells if row.speed and family(row.cell.drafter) == OURS]


def ends_of(run: Study) -> dict[Place, float]:
    """The best speed of ours in each place, prefill and all, against autoregressive decoding."""
    best: dict[Place, float] = {}
    for row in measured(run):
        greedy = not (row.cell.control or row.cell.temperature)
        if greedy and row.speed and row.speed.end_to_end:
            best[row.cell.place] = max(best.get(row.cell.place, 0.0), row.speed.end_to_end.mean)
    return best


def context(grid: Grid) -> Iterator[Check]:
    """Whether what ours keeps of its own document is worth more than as much of another's."""
    if "other_prompt" not in grid.run.config.sweep.controls:
        return
    for place, temperature in grid.columns:
        gaps = {budget: grid.use_of_context(place, temperature, budget) for budget in grid.budgets}
        budget, most = max(gaps.items(), key=lambda item: item[1].low)
        documents = grid.documents(place)
        yield judged(
            row=f"{OURS}, own − other document's context where it tells most, {' '.join(place)}, "
            f"{when(temperature)}",
            value=most,
            target="above 0 by its interval at some window",
            met=enough(documents, most.low > 0),
            note=f"behind {budget_text(budget)}, {points(most)} points" + few(documents),
        )


def faster(run: Study) -> Iterator[Check]:
    """The fastest measured cell of ours against autoregressive decoding; not decided without clocks."""
    rows, target = fastest(measured(run)), f"at least {FASTER:g}"
    for best in rows:
        assert best.speed is not None
        value = best.speed.speedup
        yield judged(
            row=f"fastest {OURS} ÷ AR, {' '.join(best.cell.place)}",
            value=value,
            target=target,
            met=value.mean >= FASTER,
            note=f"{settings_text(best.cell)}; {best.speed.num_clocked} documents",
        )
    if not rows:
        row = f"fastest {OURS} ÷ AR"
        yield Check(row=row, value=None, target=target, met=None, note="nothing was timed in this run")
