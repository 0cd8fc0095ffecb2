"""The page of the study: Markdown tables from finished runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import jinja2

from pipeline.artifacts import provenance
from pipeline.config_sweep import family
from pipeline.metrics import Interval, seeded_difference
from pipeline.recommend import Choice
from pipeline.report.summary import FamilyGain
from pipeline.rows import CellRow, Count, PredictedRow, PromptRow

if TYPE_CHECKING:
    from benchmarks.study import Study

GAMMA, SMALLEST, SAMPLES, SEED = 4, 64, 2000, 42
HOW = (0.0, "greedily"), (1.0, "at temperature 1")
# What is compared behind the smallest budget: the paper's loss, and the same two trained with forward KL.
PAPER, KL = ("multi_view", "full_only"), ("kl", "full_only_kl")
CHANGES = {
    "full_only": "L_A only, no sparse branch (Table 3)",
    "lambda_1": "λ = 1 instead of 0.5 (Table 3)",
    "single_budget": "one fixed budget, 256 (Table 3)",
    "one_view": "one budget drawn per step instead of two",
    "four_views": "four budgets drawn per step",
    "with_b_0": "B = 0 among the trained budgets",
    "kl": "forward KL in both branches",
    "total_variation": "total variation in both branches",
    "rope_linear": "linear RoPE scaling by 4, distilled so",
    "on_policy": "a quarter of the labels on the target's own sampled text",
}


def page(studies: Mapping[str, Study], checks: Sequence[Mapping[str, object]]) -> str:
    grid, adaptive = studies["table-1"], studies["adaptive"]
    cells = families_of(studies)
    config, rows = grid.config, ablation_rows(cells)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks", "."), undefined=jinja2.StrictUndefined
    ).get_template("study.md.j2")
    return (
        template.render(
            target=config.target,
            drafter=config.drafter,
            steps=config.train.steps,
            made=provenance(),
            gamma=GAMMA,
            smallest=SMALLEST,
            checks=check_table(checks),
            headline=headline_table(grid.summary.families, PAPER),
            headline_kl=headline_table(studies["ablations"].summary.families, KL),
            grid=grid_table(grid),
            prediction=prediction_table(grid),
            sources=measured_table(studies["table-2"].cells),
            ablations=ablation_table(rows),
            ablation_words=ablation_words(rows),
            nothing_kept=nothing_kept(cells),
            gammas=gamma_table(studies["figure-3"].cells),
            adaptive=adaptive_table(adaptive.cells),
            adaptive_words=adaptive_words(adaptive.cells),
            advice=advice_table(grid),
        )
        + "\n"
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def check_table(checks: Sequence[Mapping[str, object]]) -> str:
    def value(given: object) -> str:
        return "" if given is None else f"{given:.3g}"

    told = {True: "yes", False: "**no**", None: "not measured"}
    return markdown(
        ["what", "value", "target", "met", "note"],
        [
            [c["row"], value(c["value"]), c["target"], told[c["met"]], c["note"]]  # type: ignore[index]
            for c in checks
        ],
    )


def points(gain: Any) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


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
    return f"{100 * min(max(other.mean / gain.mean, 0), 1):.0f} %" if other and gain.low > 0 else ""


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
    rows = []
    for dataset, context, budget in dict.fromkeys(
        (p.dataset, p.context, p.budget) for p in grid.predicted if p.drafter == "multi_view~42"
    ):
        here = [
            p
            for p in grid.predicted
            if (p.drafter, p.dataset, p.context, p.budget) == ("multi_view~42", dataset, context, budget)
        ]
        best = max(here, key=lambda p: p.speedup)
        cell, timed = replayed[key(best)], measured.get(key(best))
        at_four = [
            acceptance(replayed.get((drafter, dataset, context, best.policy, budget, GAMMA, temperature)))
            for drafter in ("full_only~42", "multi_view~42")
            for temperature in (0.0, 1.0)
        ]
        rows.append(
            [dataset, context, budget, *at_four, best.gamma, acceptance(cell), speed(best), speed(timed)]
        )
    head = ["data", "context", "B", "full_only, greedy", "full_only, T = 1", "multi_view, greedy",
            "multi_view, T = 1", "best γ", "acceptance", "predicted speedup", "measured"]  # fmt: skip
    return markdown(head, rows)


def prediction_table(grid: Study) -> str:
    head = ["data", "context", "which", "cells", "median error, %", "worst, %"]
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
            ]
            for s in grid.summary.prediction
        ],
    )


def key(cell: CellRow | PredictedRow) -> tuple[object, ...]:
    return (
        cell.drafter, cell.dataset, cell.context, cell.policy, cell.budget, cell.gamma, cell.temperature
    )  # fmt: skip


def acceptance(cell: CellRow | None) -> str:
    return "" if cell is None or cell.acceptance is None else f"{100 * cell.acceptance:.1f}"


def speed(cell: CellRow | PredictedRow | Choice | None) -> str:
    if cell is None or cell.speedup is None or cell.speedup_low is None or cell.speedup_high is None:
        return ""
    return interval_text((cell.speedup, cell.speedup_low, cell.speedup_high))


def measured_table(cells: Sequence[CellRow]) -> str:
    head = ["data", "context", "source", "policy", "B", "acceptance", "speedup", "end to end", "AR tokens/s",
            "exact"]  # fmt: skip
    return markdown(
        head,
        [
            [
                c.dataset, c.context, c.drafter, c.policy, c.budget, acceptance(c), speed(c),
                f"{c.end_to_end_speedup or 0:.2f}", f"{c.ar_tokens_per_s or 0:.0f}",
                f"{c.exact_prompts} of {c.num_prompts}",
            ]
            for c in cells
            if c.mode == "measure"
        ],
    )  # fmt: skip


def gamma_table(cells: Sequence[CellRow]) -> str:
    gammas = sorted({c.gamma for c in cells})
    places = dict.fromkeys((c.dataset, c.context) for c in cells)
    found = {(c.dataset, c.context, c.gamma): speed(c) for c in cells}
    return markdown(
        ["data", "context", *(f"γ = {gamma}" for gamma in gammas)],
        [[*place, *(found.get((*place, gamma), "") for gamma in gammas)] for place in places],
    )


def adaptive_table(cells: Sequence[CellRow]) -> str:
    lengths = sorted({(c.gamma, c.threshold) for c in cells})
    found = {(c.dataset, c.context, c.gamma, c.threshold): speed(c) for c in cells}
    names = [f"γ = {g}" + (f", stop under {t:g}" if t else "") for g, t in lengths]
    return markdown(
        ["data", "context", *names],
        [[*place, *(found.get((*place, *one), "") for one in lengths)] for place in places_of(cells)],
    )


def adaptive_words(cells: Sequence[CellRow]) -> str:
    """In how many places stopping early has the fastest cell, and whether its interval says so."""
    won = clear = 0
    for place in places_of(cells):
        here = [c for c in cells if (c.dataset, c.context) == place and c.speedup is not None]
        best, fixed = (
            max((c for c in here if bool(c.threshold) is early), key=lambda c: c.speedup or 0)
            for early in (True, False)
        )
        won += (best.speedup or 0) > (fixed.speedup or 0)
        clear += (best.speedup_low or 0) > (fixed.speedup_high or 0)
    total = len(places_of(cells))
    return (
        f"The best cell that stops early is faster than the best fixed γ in {won} of {total} places, in "
        f"{clear} of them by intervals that do not overlap."
    )


def places_of(cells: Sequence[CellRow]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((c.dataset, c.context) for c in cells))


Ablation = tuple[str, str, dict[tuple[int | str, float], Interval]]
BySeed = Mapping[str, Mapping[str, PromptRow]]  # training seed → prompt →
Families = Mapping[tuple[str, str, int | str, float], BySeed]  # variant, data set, budget, temperature →


def families_of(studies: Mapping[str, Study]) -> Families:
    """The rows that ablations compare; the three contexts of a data set are pooled."""
    cells: dict[tuple[str, str, int | str, float], dict[str, dict[str, PromptRow]]] = {}
    for row in (row for name in ("table-3", "ablations", "on-policy") for row in studies[name].rows):
        if row.gamma == GAMMA and not row.control and row.num_proposed:
            by_seed = cells.setdefault(
                (family(row.drafter), row.dataset, row.budget, row.temperature), defaultdict(dict)
            )
            by_seed[row.drafter.partition("~")[2]][row.prompt_id] = row
    return cells


def change(cells: Families, name: str, dataset: str, budget: int | str, temperature: float) -> Interval:
    """What one changed family is accepted more than `multi_view`, seed by seed."""
    ours, theirs = (cells[one, dataset, budget, temperature] for one in (name, "multi_view"))
    return difference(ours, theirs)


def ablation_rows(cells: Families) -> list[Ablation]:
    """Every change in every data set: (name, data set, (budget, temperature) →)."""
    budgets: tuple[int | str, ...] = (SMALLEST, "full")
    datasets = dict.fromkeys(dataset for _, dataset, *_ in cells)
    return [
        (name, dataset, {at: change(cells, name, dataset, *at) for at in product(budgets, (0.0, 1.0))})
        for name, dataset in product(CHANGES, datasets)
    ]


def nothing_kept(cells: Families) -> str:
    """What B = 0 among the trained budgets is worth where nothing of the prefix is kept."""
    datasets = dict.fromkeys(dataset for _, dataset, *_ in cells)
    return "; ".join(
        f"{how} "
        + ", ".join(f"{points(change(cells, 'with_b_0', dataset, 0, t))} ({dataset})" for dataset in datasets)
        for t, how in HOW
    )


def ablation_table(rows: Sequence[Ablation]) -> str:
    columns = [(budget, temperature) for budget in (SMALLEST, "full") for temperature in (0.0, 1.0)]
    head = ["drafter", "what differs", "data", "B = 64, greedy", "B = 64, T = 1", "full, greedy",
            "full, T = 1"]  # fmt: skip
    return markdown(
        head,
        [
            [f"`{name}`", CHANGES[name], dataset, *(points(cells[c]) if c in cells else "" for c in columns)]
            for name, dataset, cells in rows
        ],
    )


def ablation_words(rows: Sequence[Ablation]) -> str:
    """Plainly, which changes help and which do not, by the intervals behind the smallest budget.

    Said of a temperature where at least two data sets show it and none shows the contrary.
    """
    lines = []
    for name in dict.fromkeys(name for name, _, _ in rows):
        parts = []
        for temperature, how in HOW:
            told = [cells[SMALLEST, temperature] for other, _, cells in rows if other == name]
            up, down = sum(i.low > 0 for i in told), sum(i.high < 0 for i in told)
            verdict = "makes no clear difference"
            if up >= 2 and not down:
                verdict = "helps"
            elif down >= 2 and not up:
                verdict = "hurts"
            worst, best = min(i.mean for i in told), max(i.mean for i in told)
            parts.append(f"{verdict} {how} ({100 * worst:+.1f} to {100 * best:+.1f} points)")
        lines.append(f"- `{name}`, {CHANGES[name]}: {parts[0]}, {parts[1]}")
    return "\n".join(lines)


def difference(ours: BySeed, theirs: BySeed) -> Interval:
    """Two families over the training seeds that both have and the prompts that all of these drafters hold."""
    seeds = sorted(ours.keys() & theirs.keys())
    prompts = sorted(set.intersection(*(set(side[seed]) for side in (ours, theirs) for seed in seeds)))

    def counts(side: BySeed) -> tuple[list[list[Count]], list[list[Count]]]:
        rows = [[side[seed][prompt] for prompt in prompts] for seed in seeds]
        accepted = [[row.num_accepted for row in one] for one in rows]
        return accepted, [[row.num_proposed or 0 for row in one] for one in rows]

    clusters = [ours[seeds[0]][prompt].document_id for prompt in prompts]
    return seeded_difference(counts(ours), counts(theirs), samples=SAMPLES, seed=SEED, clusters=clusters)


def advice_table(grid: Study) -> str:
    rows = []
    for advice in grid.summary.recommendations:
        choice, other = advice.choice or advice.runner_up, advice.runner_up if advice.choice else None
        what = "" if advice.choice else f"{advice.why}. The best: "
        rows.append(
            [
                advice.dataset,
                advice.context,
                what + (cell_text(choice) if choice else ""),
                speed(choice),
                interval_text(choice.expected) if choice else "",
                "" if advice.best_again is None else f"{advice.best_again:.2f}",
                f"{choice.end_to_end:.2f}" if choice and choice.end_to_end else "",
                cell_text(other) if other else "",
            ]
        )
    head = ["data", "context", "deploy", "first measured", "on fresh repeats", "best on fresh repeats",
            "end to end", "runner-up"]  # fmt: skip
    return markdown(head, rows)


def cell_text(choice: Choice) -> str:
    return f"{choice.drafter}, {choice.policy}, B = {choice.budget}, γ = {choice.gamma}"


def interval_text(interval: tuple[float, float, float]) -> str:
    mean, low, high = interval
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"
