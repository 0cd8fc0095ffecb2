"""Tables of the study of windows: how often each drafter is accepted behind each, and what training took."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.page_parts import percent, points
from benchmarks.real_study.tables import OURS
from benchmarks.study.runs import Study, manifest
from benchmarks.study.tables import when
from benchmarks.windows_study.checks import Grid, first_of_reached, homes
from pipeline.axes import budget_text
from pipeline.intervals import bootstrap_interval
from pipeline.markdown import table
from pipeline.results.pool import documents


def specialists_table(grid: Grid) -> str:
    """Each specialist − ours in points, by window; bold at home."""
    trained = homes(grid.run.config)
    rows = []
    for place, temperature in grid.columns:
        for name, home in trained.items():
            cells = []
            for budget in grid.budgets:
                text = points(grid.change(name, OURS, place, temperature, budget))
                cells.append(f"**{text}**" if budget == home else text)
            rows.append([*place, when(temperature), name, *cells])
    return table(["data", "context", "decoded", "drafter", *map(budget_text, grid.budgets)], rows)


def first_table(grids: Sequence[tuple[str, Grid]]) -> str:
    """Share of rounds whose first proposal is accepted, by kind of drafter and window; seeds pooled."""
    rows = []
    for kind, grid in grids:
        config = grid.run.config
        for place, temperature in grid.columns:
            for variant in config.train.variants:
                cells = []
                for budget in grid.budgets:
                    by_seed = grid.of_family(variant.name, place, temperature, budget)
                    found = [row for by_prompt in by_seed.values() for row in by_prompt.values()]
                    share = bootstrap_interval(
                        *first_of_reached(found),
                        samples=config.report.bootstrap_samples,
                        seed=config.seed,
                        clusters=documents(found),
                    )
                    cells.append(percent(share))
                rows.append([*place, when(temperature), kind, variant.name, *cells])
    budgets = grids[0][1].budgets
    return table(["data", "context", "decoded", "kind", "drafter", *map(budget_text, budgets)], rows)


def training_table(runs: Sequence[tuple[str, Study]]) -> str:
    """Steps and seconds of every drafter, by the manifests of their folders."""
    rows = []
    for kind, run in runs:
        steps = {variant.name: run.config.train.steps_of(variant) for variant in run.config.train.drafters}
        for folder, (name, made) in zip(run.trained, steps.items(), strict=True):
            rows.append([kind, name, made, f"{manifest(folder)['seconds'] / 60:.1f}" if made else ""])
    return table(["kind", "drafter", "steps", "minutes"], rows)


def context_table(grid: Grid) -> str:
    """Ours, own − other document's kept entries, in points by window."""
    rows = [
        [
            *place,
            when(temperature),
            *(points(grid.use_of_context(place, temperature, b)) for b in grid.budgets),
        ]
        for place, temperature in grid.columns
    ]
    return table(["data", "context", "decoded", *map(budget_text, grid.budgets)], rows)
