"""Tables of a real target's study, from the report of its run; γ is the one that the report leads with."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.page_parts import acceptance, interval_text, points
from benchmarks.study.families import student
from benchmarks.study.runs import Study, manifest
from benchmarks.study.speed import speedup_of
from benchmarks.study.tables import looping, when
from pipeline.axes import BASELINES, Budget, Place, budget_order, budget_text, family
from pipeline.markdown import table
from pipeline.results.axes import Axes
from pipeline.results.recommend import settings_text
from pipeline.results.summary import FamilyGain, Gain
from pipeline.store.rows import CellRow

OURS, PLAIN = "multi_view", "full_only"


def smallest(run: Study) -> Budget:
    """The smallest budget that was swept; 0 keeps nothing and does not count."""
    return Axes.of(run.config).smallest_budget or "full"


def leading_gamma(run: Study) -> int:
    """The γ that the report leads with."""
    return Axes.of(run.config).gamma


def compared(run: Study) -> list[Gain | FamilyGain]:
    """`multi_view` − `full_only` behind the smallest budget at the report's γ, over all prompts.

    With several training seeds in common these are families' gains, else those of one drafter each.
    """
    gains: Sequence[Gain] = run.summary.families or run.summary.headline
    wanted = OURS, PLAIN, None, "all", leading_gamma(run), smallest(run)
    return [gain for gain in gains if names(gain) == wanted]


def names(gain: Gain) -> tuple[object, ...]:
    """What decides whether a gain is the headline's: both variants, control, prompts, γ and budget."""
    cell = gain.cell
    return family(cell.drafter), family(gain.baseline), cell.control, gain.prompts, cell.gamma, cell.budget


def beside(run: Study, gain: Gain, prompts: str = "all", **changes: object) -> Gain | None:
    """The gain of the same pair in the same cell with these changes, or over other prompts."""
    gains: Sequence[Gain] = run.summary.families or run.summary.headline
    wanted = gain.cell.vary(**changes), gain.baseline, prompts
    return next((g for g in gains if (g.cell, g.baseline, g.prompts) == wanted), None)


def headline_table(run: Study) -> str:
    rows = []
    for gain in compared(run):
        other = beside(run, gain, control="other_prompt")
        shown = [gain, beside(run, gain, "not_looping"), other, beside(run, gain, budget="full")]
        lost = points(other.lost) if other and other.lost else ""
        seeds = getattr(gain, "by_seed", [])
        by_t = "{:+.1f} to {:+.1f}".format(*(100 * end for end in student(seeds))) if len(seeds) > 1 else ""
        rows.append(
            [*gain.cell.place, when(gain.cell.temperature), *(points(g.value) if g else "" for g in shown),
             lost, max(len(seeds), 1), by_t, gain.num_documents]
        )  # fmt: skip
    head = ["data", "context", "decoded", budget_text(smallest(run)), "without looping texts",
            "under other_prompt", "full cache", "not explained by it", "seeds", "Student's t",
            "documents"]  # fmt: skip
    return table(head, rows)


def headline_words(run: Study) -> str:
    """In how many places the gain is clear, and in how many some of it needs the context."""
    said = []
    for temperature in run.config.sweep.temperatures:
        gains = [gain for gain in compared(run) if gain.cell.temperature == temperature]
        if not gains:
            continue
        others = [beside(run, gain, control="other_prompt") for gain in gains]
        more, less = sum(g.value.low > 0 for g in gains), sum(g.value.high < 0 for g in gains)
        needs = sum(bool(other and other.lost and other.lost.low > 0) for other in others)
        said.append(
            f"{when(temperature)} `{OURS}` is accepted clearly more in {more} of {len(gains)} places and "
            f"clearly less in {less}, and in {needs} of them part of the difference needs the context"
        )
    if not said:
        return f"There is no pair of `{OURS}` and `{PLAIN}` to compare."
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}. Clear means that the interval leaves out 0."


def replayed(run: Study, temperature: float, **fixed: object) -> list[CellRow]:
    """Replayed or estimated cells at the report's γ whose coordinates have these values."""
    return [
        row
        for row in run.cells
        if row.mode != "measure"
        and (row.cell.gamma, row.cell.temperature) == (leading_gamma(run), temperature)
        and all(getattr(row.cell, name) == value for name, value in fixed.items())
    ]


def grid_table(run: Study, temperature: float) -> str:
    """Acceptance by place and budget; a source without a budget stands in every row of a place."""
    cells = {
        (r.cell.place, r.cell.budget, r.cell.drafter): r for r in replayed(run, temperature, control=None)
    }
    drafters = [name for name in dict.fromkeys(key[2] for key in cells) if name not in BASELINES]
    free = [name for name in dict.fromkeys(key[2] for key in cells) if name in BASELINES]
    budgets = sorted({key[1] for key in cells if key[2] in drafters}, key=budget_order)
    rows = []
    for place in dict.fromkeys(key[0] for key in cells):
        without = {
            name: next((r for k, r in cells.items() if (k[0], k[2]) == (place, name)), None) for name in free
        }
        for budget in budgets:
            row = [cells.get((place, budget, drafter)) for drafter in drafters]
            rows.append([*place, budget, *map(acceptance, row), *map(acceptance, without.values())])
    return table(["data", "context", "B", *drafters, *free], rows)


def in_short(run: Study) -> str:
    """Acceptance of every source over the places, behind the smallest budget where it has one."""
    rows = replayed(run, 0.0, control=None)
    parts = []
    for name in dict.fromkeys(row.cell.drafter for row in rows):
        budget = None if name in BASELINES else smallest(run)
        means = [
            100 * row.acceptance.mean
            for row in rows
            if row.cell.drafter == name and row.acceptance and budget in (None, row.cell.budget)
        ]
        parts.append(f"`{name}` {min(means):.1f} to {max(means):.1f} %")
    texts = {row.cell.place: (row.num_looping, row.num_prompts) for row in rows}
    looping, prompts = (sum(pair[at] for pair in texts.values()) for at in (0, 1))
    return (
        f"Over the {len(texts)} places and greedily, at γ = {leading_gamma(run)} and behind "
        f"{budget_text(smallest(run))}, accepted are of {', of '.join(parts)}. Of {prompts} texts {looping} "
        "loop, which flatters every source and prompt lookup most."
    )


def context_table(run: Study) -> str:
    """Acceptance with the real prefix minus that with another document's at the same positions."""
    gaps = {
        (g.cell.place, g.cell.temperature, g.cell.drafter, g.cell.budget): g
        for g in run.summary.controls
        if g.cell.control == "other_prompt" and g.cell.gamma == leading_gamma(run)
    }
    columns = list(dict.fromkeys((d, b) for _, _, d, b in gaps if family(d) in (OURS, PLAIN)))
    rows = [
        [
            *place,
            when(t),
            *(points(gaps[place, t, *c].value) if (place, t, *c) in gaps else "" for c in columns),
        ]
        for place, t in dict.fromkeys((place, t) for place, t, _, _ in gaps)
    ]
    return table(["data", "context", "decoded", *(f"{d}, {budget_text(b)}" for d, b in columns)], rows)


def looping_table(run: Study) -> str:
    """Greedy texts by place: how many loop, and what share of them the draft vocabulary holds."""
    held = {(c.dataset, c.context): c for c in run.summary.coverage if not c.temperature}
    first: dict[Place, CellRow] = {}
    for row in replayed(run, 0.0, control=None):
        first.setdefault(row.cell.place, row)
    return table(
        ["data", "context", "looping", "documents", "in the draft vocabulary"],
        [
            [*place, looping(row), row.num_documents, f"{held[place].share:.1%}" if place in held else "all"]
            for place, row in first.items()
        ],
    )


def fastest(cells: Sequence[CellRow]) -> list[CellRow]:
    """The fastest measured greedy cell of each place, with the true prefix."""
    best: dict[Place, CellRow] = {}
    for row in cells:
        if row.speed and not (row.cell.control or row.cell.temperature):
            best[row.cell.place] = max(best.get(row.cell.place, row), row, key=speedup_of)
    return list(best.values())


def advice_table(run: Study) -> str:
    rows = []
    for advice in run.summary.recommendations:
        choice = advice.choice or advice.runner_up
        what = settings_text(choice.cell) if choice else ""
        end_to_end = choice.end_to_end if choice else None
        rows.append(
            [
                advice.dataset,
                advice.context,
                what if advice.choice else f"nothing: {advice.why}" + (f". The best: {what}" if what else ""),
                interval_text(choice.expected) if choice else "",
                "" if end_to_end is None else f"{end_to_end:.2f}",
                choice.num_documents if choice else "",
            ]
        )
    return table(["data", "context", "deploy", "decode speedup", "end to end", "documents"], rows)


def machine(run: Study) -> str:
    """What the sweep ran on, and with which versions, by its manifest."""
    made = manifest(run.swept)["provenance"]
    versions = made["versions"]
    return (
        f"{made['platform']}, {made['cpus']} CPUs, no GPU; Python {made['python']}, torch "
        f"{versions['torch']}, transformers {versions['transformers']}"
    )


def costs(run: Study) -> dict[str, float]:
    """What labels and answers cost: counts and seconds from the manifest of stage teach."""
    made = manifest(run.taught)
    return {**made["counts"], "seconds": made["seconds"]}
