"""The page of the study: Markdown tables from finished runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from benchmarks import study_ablations as ablations
from benchmarks.page_parts import acceptance, check_table, end_to_end, interval_text, markdown, points, speed
from benchmarks.study_ablations import GAMMA, SAMPLES, SEED, SMALLEST
from pipeline import metrics
from pipeline.artifacts import provenance
from pipeline.metrics import Interval
from pipeline.recommend import settings_text
from pipeline.report.summary import ArSpeed, Budget, FamilyGain, Summary
from pipeline.rows import CellRow, PredictedRow, PromptRow

if TYPE_CHECKING:
    from benchmarks.study import Study

# What is compared behind the smallest budget: the paper's loss, and the same two trained with forward KL.
PAPER, KL = ("multi_view", "full_only"), ("kl", "full_only_kl")
OURS = "multi_view~42"
ACCEPTED = [("full_only~42", 0.0), (OURS, 0.0), ("untrained", 1.0), ("full_only~42", 1.0), (OURS, 1.0)]


def page(studies: Mapping[str, Study], checks: Sequence[Mapping[str, object]]) -> str:
    grid, adaptive = studies["table-1"], studies["adaptive"]
    cells = ablations.families_of(studies)
    config, rows, early = grid.config, ablations.ablation_rows(cells), early_stops(adaptive.rows)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks", "."), undefined=jinja2.StrictUndefined
    ).get_template("study.md.j2")
    return (
        template.render(
            target=config.target,
            drafter=config.drafter,
            steps=config.train.steps,
            made=provenance(),
            tunables=f", `GLIBC_TUNABLES={told}`" if (told := os.environ.get("GLIBC_TUNABLES")) else "",
            gamma=GAMMA,
            smallest=SMALLEST,
            checks=check_table(checks),
            headline=headline_table(grid.summary.families, PAPER),
            headline_kl=headline_table(studies["ablations"].summary.families, KL),
            grid=grid_table(grid),
            prediction=prediction_table(grid),
            context_use=context_table(grid.summary),
            sources=measured_table(studies["table-2"].cells),
            ar=ar_table(studies["table-2"].summary.ar_tokens_per_s),
            ablations=ablations.ablation_table(rows),
            ablation_words=ablations.ablation_words(rows),
            seed_spread=100 * ablations.seed_spread(rows),
            nothing_kept=ablations.nothing_kept(cells),
            gammas=gamma_table(studies["figure-3"].cells),
            adaptive=adaptive_table(adaptive.cells, early),
            adaptive_words=adaptive_words(early),
            fewest=min(c.num_clocked or 0 for c in studies["table-2"].cells if c.mode == "measure"),
            advice=advice_table(grid),
        )
        + "\n"
    )


def same(families: Sequence[FamilyGain], gain: FamilyGain, **changes: object) -> FamilyGain | None:
    """The gain of the same cell but for what is changed."""
    names = ("drafter", "baseline", "dataset", "context", "policy", "budget", "control", "gamma",
             "temperature", "seed", "prompts")  # fmt: skip
    wanted = {name: getattr(gain, name) for name in names} | changes
    return next((g for g in families if all(getattr(g, n) == v for n, v in wanted.items())), None)


def headline(families: Sequence[FamilyGain], pair: tuple[str, str]) -> list[FamilyGain]:
    """The gains of one family over the other behind the smallest budget, over all prompts."""
    wanted = (*pair, SMALLEST, None, "all", GAMMA)
    return [
        gain
        for gain in families
        if (gain.drafter, gain.baseline, gain.budget, gain.control, gain.prompts, gain.gamma) == wanted
    ]


def when(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def explained(families: Sequence[FamilyGain], gain: FamilyGain) -> str:
    """The share of a gain that is there under `other_prompt`; empty where there is no clear gain."""
    other = same(families, gain, control="other_prompt")
    return f"{100 * other.mean / gain.mean:.0f} %" if other and gain.low > 0 else ""


def headline_table(families: Sequence[FamilyGain], pair: tuple[str, str]) -> str:
    """One family against the other behind the smallest budget, over three training seeds."""
    rows = []
    for gain in headline(families, pair):
        varied, other, full = (
            same(families, gain, **changes)
            for changes in ({"prompts": "not_looping"}, {"control": "other_prompt"}, {"budget": "full"})
        )
        shown = [points(one) if one else "" for one in (gain, varied, other)]
        rows.append(
            [gain.dataset, gain.context, when(gain.temperature), *shown, explained(families, gain),
             points(full) if full else "", gain.num_documents]
        )  # fmt: skip
    head = ["data", "context", "decoded", f"B = {SMALLEST}", "without looping texts", "under other_prompt",
            "explained by it", "full cache", "documents"]  # fmt: skip
    return markdown(head, rows)


def grid_table(grid: Study) -> str:
    """Per data set, context and budget: acceptance, and the γ with the best predicted speed."""
    replayed = {key(c): c for c in grid.cells if c.mode in ("replay", "estimate") and not c.control}
    measured = {key(c): c for c in grid.cells if c.mode == "measure"}
    predicted = [row for row in grid.predicted if row.drafter == OURS]
    rows = []
    for place in dict.fromkeys((p.dataset, p.context, p.budget) for p in predicted):
        here = [p for p in predicted if (p.dataset, p.context, p.budget) == place]
        best = max(here, key=lambda p: p.speedup)
        at_four = [
            acceptance(
                replayed.get(key(best)._replace(drafter=drafter, gamma=GAMMA, temperature=temperature))
            )
            for drafter, temperature in ACCEPTED
        ]
        found = acceptance(replayed[key(best)]), speed(best), speed(measured.get(key(best)))
        rows.append([*place, *at_four, best.gamma, *found])
    names = [f"{drafter.partition('~')[0]}, {'T = 1' if t else 'greedy'}" for drafter, t in ACCEPTED]
    head = ["data", "context", "B", *names, "best γ", "acceptance", "predicted speedup", "measured"]
    return markdown(head, rows)


def context_table(summary: Summary) -> str:
    """Acceptance with the real prefix minus that with another document's at the same positions."""
    budgets: tuple[Budget, ...] = (SMALLEST, "full")
    wanted = list(product(("full_only~42", OURS), (0.0, 1.0), budgets))
    found = {
        (gap.dataset, gap.context, gap.drafter, gap.temperature, gap.budget): gap
        for gap in summary.controls
        if gap.control == "other_prompt" and gap.gamma == GAMMA
    }
    heads = [
        f"{drafter.partition('~')[0]}, B = {budget}, {'T = 1' if t else 'greedy'}"
        for drafter, t, budget in wanted
    ]
    places = dict.fromkeys(place[:2] for place in found)
    return markdown(
        ["data", "context", *heads],
        [
            [*p, *(points(found[*p, *cell]) if (*p, *cell) in found else "" for cell in wanted)]
            for p in places
        ],
    )


def prediction_table(grid: Study) -> str:
    head = ["data", "context", "which", "cells", "median error, %", "worst, %", "with its sign, median, %"]
    return markdown(
        head,
        [
            [
                s.dataset,
                s.context,
                s.what,
                s.cells,
                f"{100 * s.median_error:.1f}",
                f"{100 * s.worst_error:.1f}",
                f"{100 * s.bias:+.1f}",
            ]
            for s in grid.summary.prediction
        ],
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


def key(cell: CellRow | PredictedRow) -> Key:
    return Key(*(getattr(cell, name) for name in Key._fields))


def measured_table(cells: Sequence[CellRow]) -> str:
    head = ["data", "context", "source", "policy", "B", "acceptance", "speedup", "end to end", "documents",
            "exact"]  # fmt: skip
    return markdown(
        head,
        [
            [
                c.dataset, c.context, c.drafter, c.policy, c.budget, acceptance(c), speed(c), end_to_end(c),
                c.num_clocked, f"{c.exact_prompts} of {c.num_prompts}",
            ]
            for c in cells
            if c.mode == "measure"
        ],
    )  # fmt: skip


def ar_table(speeds: Sequence[ArSpeed]) -> str:
    return markdown(
        ["data", "context", "tokens/s of autoregressive decoding", "documents"],
        [
            [s.dataset, s.context, f"{s.mean:.0f} [{s.low:.0f}, {s.high:.0f}]", s.num_documents]
            for s in speeds
        ],
    )


def gamma_table(cells: Sequence[CellRow]) -> str:
    gammas = sorted({c.gamma for c in cells})
    places = dict.fromkeys((c.dataset, c.context) for c in cells)
    found = {(c.dataset, c.context, c.gamma): speed(c) for c in cells}
    return markdown(
        ["data", "context", *(f"γ = {gamma}" for gamma in gammas)],
        [[*place, *(found.get((*place, gamma), "") for gamma in gammas)] for place in places],
    )


class EarlyStop(NamedTuple):
    """The fastest cell of a place that stops drafts early against the fastest that does not.

    Both are the fastest of what was measured, so both are rather lucky. `ratio` is of their decode times over
    the same prompts; its interval resamples documents.
    """

    fixed: int
    early: int
    ratio: Interval


def early_stops(rows: Sequence[PromptRow]) -> dict[tuple[str, str], EarlyStop]:
    times: dict[tuple[str, str], dict[tuple[int, float], dict[str, PromptRow]]] = {}
    for row in rows:
        lengths = times.setdefault((row.dataset, row.context), {})
        lengths.setdefault((row.gamma, row.threshold), {})[row.prompt_id] = row
    found = {}
    for place, cells in times.items():
        seconds = {
            length: {p: sum(row.decode_s) for p, row in cell.items()} for length, cell in cells.items()
        }
        fixed, early = (
            min((one for one in seconds if bool(one[1]) is stops), key=lambda one: sum(seconds[one].values()))
            for stops in (False, True)
        )
        prompts = sorted(cells[fixed])
        ratio = metrics.bootstrap_interval(
            [seconds[fixed][p] for p in prompts],
            [seconds[early][p] for p in prompts],
            samples=SAMPLES,
            seed=SEED,
            clusters=[cells[fixed][p].document_id for p in prompts],
        )
        found[place] = EarlyStop(fixed[0], early[0], ratio)
    return found


def adaptive_table(cells: Sequence[CellRow], early: Mapping[tuple[str, str], EarlyStop]) -> str:
    lengths = sorted({(c.gamma, c.threshold) for c in cells})
    found = {(c.dataset, c.context, c.gamma, c.threshold): speed(c) for c in cells}
    names = [f"γ = {g}" + (f", stop under {t:g}" if t else "") for g, t in lengths]
    return markdown(
        ["data", "context", *names, "best that stops ÷ best fixed"],
        [
            [*place, *(found.get((*place, *one), "") for one in lengths), interval_text(early[place].ratio)]
            for place in early
        ],
    )


def adaptive_words(early: Mapping[tuple[str, str], EarlyStop]) -> str:
    """In how many places stopping early is faster than the best fixed γ, and where intervals say so."""
    ratios = [one.ratio for one in early.values()]
    faster, clearly = sum(r.mean > 1 for r in ratios), sum(r.low > 1 for r in ratios)
    slower = sum(r.high < 1 for r in ratios)
    return (
        f"The best cell that stops early is faster than the best fixed γ in {faster} of {len(ratios)} "
        f"places, clearly in {clearly}, and clearly slower in {slower}; clearly means by the interval of "
        "the ratio over the same prompts."
    )


def advice_table(grid: Study) -> str:
    rows = []
    for advice in grid.summary.recommendations:
        choice, other = advice.choice or advice.runner_up, advice.runner_up if advice.choice else None
        what = "" if advice.choice else f"{advice.why}. The best: "
        rows.append(
            [
                advice.dataset,
                advice.context,
                what + (settings_text(choice) if choice else ""),
                speed(choice),
                f"{choice.run_off:.2f}" if choice and choice.run_off else "",
                interval_text(choice.expected) if choice else "",
                "" if advice.best_again is None else f"{advice.best_again:.2f}",
                f"{choice.end_to_end:.2f}" if choice and choice.end_to_end else "",
                settings_text(other) if other else "",
            ]
        )
    head = ["data", "context", "deploy", "first measured", "run-off", "on fresh repeats",
            "best on fresh repeats", "end to end", "runner-up"]  # fmt: skip
    return markdown(head, rows)
