"""The page of the study: Markdown tables from finished runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median
from typing import NamedTuple

import jinja2

from benchmarks.page_parts import acceptance, check_table, interval_text, points, speed
from benchmarks.study import ablations
from benchmarks.study import speed as speeds
from benchmarks.study.families import GAMMA, SMALLEST, families_of, student
from benchmarks.study.runs import Study, commits
from pipeline.axes import Budget
from pipeline.markdown import table
from pipeline.results.summary import FamilyGain, Summary
from pipeline.store.provenance import provenance
from pipeline.store.rows import CellRow, PredictedRow

# The families compared behind the smallest budget: with the paper's loss, and with forward KL.
PAPER, KL = ("multi_view", "full_only"), ("kl", "full_only_kl")
OURS = "multi_view~42"
ACCEPTED = [("full_only~42", 0.0), (OURS, 0.0), ("untrained", 1.0), ("full_only~42", 1.0), (OURS, 1.0)]


def page(studies: Mapping[str, Study], checks: Sequence[Mapping[str, object]]) -> str:
    grid, adaptive, changed = studies["table-1"], studies["adaptive"], studies["ablations"]
    cells, config = families_of(studies), grid.config
    rows, early = ablations.ablation_rows(cells), speeds.early_stops(adaptive.rows)
    baselines = speeds.best_baselines(grid.cells)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks.study", "."), undefined=jinja2.StrictUndefined
    ).get_template("page.md.j2")
    return (
        template.render(
            data=config.data,
            target=config.target,
            drafter=config.drafter,
            steps=config.train.steps,
            made=provenance(),
            commits=commits(studies),
            tunables=f", `GLIBC_TUNABLES={value}`" if (value := os.environ.get("GLIBC_TUNABLES")) else "",
            gamma=GAMMA,
            smallest=SMALLEST,
            checks=check_table(checks),
            headline=headline_table(grid.summary.families, PAPER),
            headline_words=headline_words(grid.summary.families, PAPER),
            headline_kl=headline_table(changed.summary.families, KL),
            headline_kl_words=headline_words(changed.summary.families, KL),
            grid=grid_table(grid),
            prediction=prediction_table(grid),
            prediction_words=prediction_words(grid),
            context_use=context_table(grid.summary),
            sources=speeds.measured_table(studies["table-2"].cells),
            baselines=speeds.baseline_table(baselines),
            baseline_words=speeds.baseline_words(baselines),
            ar=speeds.ar_table(studies["table-2"].summary.ar_tokens_per_s),
            ablations=ablations.ablation_table(rows),
            ablation_words=ablations.ablation_words(rows),
            seed_spread=100 * ablations.seed_spread(rows),
            nothing_kept=ablations.nothing_kept(cells),
            accepted=ablations.accepted_table(cells, changed.config),
            distilled_words=ablations.distilled_words(cells, changed.config),
            rope=ablations.rope_table(cells, changed.config),
            rope_words=ablations.rope_words(cells, changed.config),
            beyond=ablations.beyond_range(changed.config),
            gammas=speeds.gamma_table(studies["figure-3"].cells),
            adaptive=speeds.adaptive_table(adaptive.cells, early),
            adaptive_words=speeds.adaptive_words(early),
            fewest=min(c.speed.num_clocked for c in studies["table-2"].cells if c.speed),
            advice=speeds.advice_table(grid),
            advice_words=speeds.advice_words(grid),
        )
        + "\n"
    )


def same(
    families: Sequence[FamilyGain], gain: FamilyGain, prompts: str | None = None, **changes: object
) -> FamilyGain | None:
    """The gain of the same cell, with these changes made to it or to the prompts."""
    wanted = gain.cell.vary(**changes), gain.baseline, prompts or gain.prompts
    return next((g for g in families if (g.cell, g.baseline, g.prompts) == wanted), None)


def headline(families: Sequence[FamilyGain], pair: tuple[str, str]) -> list[FamilyGain]:
    """The gains of one family over the other behind the smallest budget, over all prompts."""
    wanted = (*pair, SMALLEST, None, "all", GAMMA)
    return [
        gain
        for gain in families
        if (
            gain.cell.drafter,
            gain.baseline,
            gain.cell.budget,
            gain.cell.control,
            gain.prompts,
            gain.cell.gamma,
        )
        == wanted
    ]


def when(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def explained(families: Sequence[FamilyGain], gain: FamilyGain) -> str:
    """The share of a gain that remains under `other_prompt`; empty where there is no clear gain."""
    other = same(families, gain, control="other_prompt")
    return f"{100 * other.value.mean / gain.value.mean:.0f} %" if other and gain.value.low > 0 else ""


def headline_table(families: Sequence[FamilyGain], pair: tuple[str, str]) -> str:
    """One family against the other behind the smallest budget, over three training seeds."""
    rows = []
    for gain in headline(families, pair):
        varied, other, full = (
            same(families, gain, prompts="not_looping"),
            same(families, gain, control="other_prompt"),
            same(families, gain, budget="full"),
        )
        shown = [points(family_gain.value) if family_gain else "" for family_gain in (gain, varied, other)]
        rows.append(
            [*gain.cell.place, when(gain.cell.temperature), *shown, explained(families, gain),
             points(other.lost) if other and other.lost else "", points(full.value) if full else "",
             gain.num_documents]
        )  # fmt: skip
    head = ["data", "context", "decoded", f"B = {SMALLEST}", "without looping texts", "under other_prompt",
            "explained by it", "not explained by it", "full cache", "documents"]  # fmt: skip
    return table(head, rows)


def headline_words(families: Sequence[FamilyGain], pair: tuple[str, str]) -> str:
    """In how many places the gain is above 0 by its interval, in how many of these by Student's t too, and
    in how many part of it needs the context."""
    parts, context = [], []
    for temperature in (0.0, 1.0):
        gains = [gain for gain in headline(families, pair) if gain.cell.temperature == temperature]
        clear = [gain for gain in gains if gain.value.low > 0]
        said = f"{when(temperature)} in {len(clear)} of {len(gains)} places"
        too = sum(len(gain.by_seed) > 1 and student(gain.by_seed)[0] > 0 for gain in clear)
        parts.append(
            said + (f", in {too} of them by Student's t over the training seeds too" if clear else "")
        )
        others = [same(families, gain, control="other_prompt") for gain in gains]
        lost = [other.lost for other in others if other and other.lost]
        context.append(
            f"{when(temperature)} above 0 in {sum(interval.low > 0 for interval in lost)} and below in "
            f"{sum(interval.high < 0 for interval in lost)} of {len(lost)} places"
        )
    return (
        f"Above 0 by the interval: {'; '.join(parts)}. What other_prompt does not explain is, by its own "
        f"interval, {'; '.join(context)}."
    )


def grid_table(grid: Study) -> str:
    """Per data set, context and budget: acceptance, and the γ with the best predicted speed.

    Which texts loop depends on the target alone: it is the same for all drafters and budgets of a place.
    """
    replayed = {key(c): c for c in grid.cells if c.mode in ("replay", "estimate") and not c.cell.control}
    measured = {key(c): c for c in grid.cells if c.mode == "measure"}
    predicted = [row for row in grid.predicted if row.cell.drafter == OURS]
    rows = []
    for place in dict.fromkeys((p.cell.dataset, p.cell.context, p.cell.budget) for p in predicted):
        here = [p for p in predicted if (p.cell.dataset, p.cell.context, p.cell.budget) == place]
        best = max(here, key=lambda p: p.speedup.mean)
        at_four = [
            acceptance(
                replayed.get(key(best)._replace(drafter=drafter, gamma=GAMMA, temperature=temperature))
            )
            for drafter, temperature in ACCEPTED
        ]
        plain = replayed.get(key(best)._replace(gamma=GAMMA))
        fastest = acceptance(replayed[key(best)]), interval_text(best.speedup), speed(measured.get(key(best)))
        rows.append([*place, looping(plain), *at_four, not_looping(plain), best.cell.gamma, *fastest])
    names = [f"{drafter.partition('~')[0]}, {'T = 1' if t else 'greedy'}" for drafter, t in ACCEPTED]
    head = ["data", "context", "B", "looping", *names, "multi_view, greedy, without looping texts", "best γ",
            "acceptance", "predicted speedup", "measured"]  # fmt: skip
    return table(head, rows)


def looping(cell: CellRow | None) -> str:
    return f"{cell.num_looping} of {cell.num_prompts}" if cell else ""


def not_looping(cell: CellRow | None) -> str:
    if cell is None or cell.acceptance_not_looping is None:
        return ""
    return f"{100 * cell.acceptance_not_looping:.1f}"


def context_table(summary: Summary) -> str:
    """Acceptance with the real prefix minus that with another document's at the same positions."""
    budgets: tuple[Budget, ...] = (SMALLEST, "full")
    wanted = list(product(("full_only~42", OURS), (0.0, 1.0), budgets))
    gaps = {
        (gap.cell.dataset, gap.cell.context, gap.cell.drafter, gap.cell.temperature, gap.cell.budget): gap
        for gap in summary.controls
        if gap.cell.control == "other_prompt" and gap.cell.gamma == GAMMA
    }
    heads = [
        f"{drafter.partition('~')[0]}, B = {budget}, {'T = 1' if t else 'greedy'}"
        for drafter, t, budget in wanted
    ]
    places = dict.fromkeys(place[:2] for place in gaps)
    return table(
        ["data", "context", *heads],
        [
            [*p, *(points(gaps[*p, *cell].value) if (*p, *cell) in gaps else "" for cell in wanted)]
            for p in places
        ],
    )


def prediction_table(grid: Study) -> str:
    head = ["data", "context", "which", "cells", "median error, %", "worst, %", "with its sign, median, %",
            "in seconds, median, %", "pace"]  # fmt: skip
    return table(
        head,
        [
            [
                s.dataset, s.context, s.what, s.cells, f"{100 * s.median_error:.1f}",
                f"{100 * s.worst_error:.1f}", f"{100 * s.bias:+.1f}", f"{100 * s.median_error_s:.1f}",
                f"{s.pace:.2f}",
            ]
            for s in grid.summary.prediction
        ],
    )  # fmt: skip


def prediction_words(grid: Study) -> str:
    """How far predicted speedups are from measured ones, each over its own prompts."""
    measured = {c.cell: c.speed.speedup.mean for c in grid.cells if c.speed}
    pairs = [(row.speedup.mean, measured.get(row.cell)) for row in grid.predicted]
    off = [100 * (predicted / actual - 1) for predicted, actual in pairs if actual]
    return (
        f"Of the same {len(off)} cells, predicted speedups (over all prompts, against a predicted time of "
        f"autoregressive decoding) are {median(off):+.1f} % off the measured ones (over fewer prompts) in "
        f"the median, {max(off, key=abs):+.1f} % at worst."
    )


class Key(NamedTuple):
    """A cell without its control, seed and mode."""

    drafter: str
    dataset: str
    context: str
    policy: str
    budget: int | str
    gamma: int
    threshold: float
    temperature: float


def key(row: CellRow | PredictedRow) -> Key:
    return Key(*(getattr(row.cell, name) for name in Key._fields))
