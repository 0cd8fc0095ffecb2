"""Measured speed on the study's page: sources of drafts, draft lengths, and what to deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from benchmarks.page_parts import acceptance, end_to_end, interval_text, speed
from benchmarks.study.families import SAMPLES, SEED
from benchmarks.study.runs import Study
from pipeline import intervals
from pipeline.axes import BASELINES, Place
from pipeline.intervals import Interval
from pipeline.markdown import table
from pipeline.results.recommend import settings_text
from pipeline.results.summary import ArSpeed
from pipeline.store.rows import CellRow, PromptRow


def measured_table(cells: Sequence[CellRow]) -> str:
    head = ["data", "context", "source", "policy", "B", "acceptance", "speedup", "end to end", "documents",
            "exact"]  # fmt: skip
    return table(
        head,
        [
            [
                *c.cell.place, c.cell.drafter, c.cell.policy, c.cell.budget, acceptance(c), speed(c),
                end_to_end(c),
                c.speed.num_clocked if c.speed else "", f"{c.exact_prompts} of {c.num_prompts}",
            ]
            for c in cells
            if c.mode == "measure"
        ],
    )  # fmt: skip


def ar_table(speeds: Sequence[ArSpeed]) -> str:
    return table(
        ["data", "context", "tokens/s of autoregressive decoding", "documents"],
        [
            [
                s.dataset,
                s.context,
                f"{s.speed.mean:.0f} [{s.speed.low:.0f}, {s.speed.high:.0f}]",
                s.num_documents,
            ]
            for s in speeds
        ],
    )


def best_baselines(cells: Sequence[CellRow]) -> list[CellRow]:
    """The fastest measured greedy cell of each baseline in each place."""
    best: dict[tuple[str, Place], CellRow] = {}
    for row in cells:
        cell = row.cell
        if row.speed and cell.drafter in BASELINES and not (cell.control or cell.temperature):
            key = cell.drafter, cell.place
            best[key] = max(best.get(key, row), row, key=speedup_of)
    return sorted(best.values(), key=lambda row: BASELINES.index(row.cell.drafter))


def speedup_of(row: CellRow) -> float:
    """The mean speedup of a measured cell."""
    assert row.speed is not None, f"{row.cell} was not measured"
    return row.speed.speedup.mean


def baseline_table(best: Sequence[CellRow]) -> str:
    return table(
        ["data", "context", "source and settings", "acceptance", "speedup", "end to end", "documents"],
        [
            [
                c.cell.dataset,
                c.cell.context,
                settings_text(c.cell),
                acceptance(c),
                speed(c),
                end_to_end(c),
                c.speed.num_clocked if c.speed else "",
            ]
            for c in best
        ],
    )


def baseline_words(best: Sequence[CellRow]) -> str:
    """In how many places each baseline is clearly faster than autoregressive decoding."""
    parts = []
    for name in dict.fromkeys(cell.cell.drafter for cell in best):
        lows = [row.speed.speedup.low for row in best if row.speed and row.cell.drafter == name]
        parts.append(f"`{name}` in {sum(low > 1 for low in lows)} of {len(lows)} places")
    return f"Clearly faster than autoregressive decoding, by this interval: {', '.join(parts)}."


def gamma_table(cells: Sequence[CellRow]) -> str:
    gammas = sorted({c.cell.gamma for c in cells})
    places = dict.fromkeys((c.cell.dataset, c.cell.context) for c in cells)
    texts = {(c.cell.dataset, c.cell.context, c.cell.gamma): speed(c) for c in cells}
    return table(
        ["data", "context", *(f"γ = {gamma}" for gamma in gammas)],
        [[*place, *(texts.get((*place, gamma), "") for gamma in gammas)] for place in places],
    )


class EarlyStop(NamedTuple):
    """The fastest cell of a place that stops drafts early against the fastest that does not.

    Each is the fastest of several measured cells, so luck favours both. `ratio` is the decode time of the
    fixed one ÷ that of the early one over the same prompts; its interval resamples documents.
    """

    fixed: int
    early: int
    ratio: Interval


def early_stops(rows: Sequence[PromptRow]) -> dict[tuple[str, str], EarlyStop]:
    times: dict[tuple[str, str], dict[tuple[int, float], dict[str, PromptRow]]] = {}
    for row in rows:
        lengths = times.setdefault((row.cell.dataset, row.cell.context), {})
        lengths.setdefault((row.cell.gamma, row.cell.threshold), {})[row.prompt_id] = row
    stops_by_place = {}
    for place, cells in times.items():
        seconds = {
            length: {p: sum(row.timing.decode_s) for p, row in cell.items() if row.timing}
            for length, cell in cells.items()
        }
        fixed, early = (
            min(
                (length for length in seconds if bool(length[1]) is stops),
                key=lambda length: sum(seconds[length].values()),
            )
            for stops in (False, True)
        )
        prompts = sorted(cells[fixed])
        ratio = intervals.bootstrap_interval(
            [seconds[fixed][p] for p in prompts],
            [seconds[early][p] for p in prompts],
            samples=SAMPLES,
            seed=SEED,
            clusters=[cells[fixed][p].document_id for p in prompts],
        )
        stops_by_place[place] = EarlyStop(fixed[0], early[0], ratio)
    return stops_by_place


def adaptive_table(cells: Sequence[CellRow], early: Mapping[tuple[str, str], EarlyStop]) -> str:
    lengths = sorted({(c.cell.gamma, c.cell.threshold) for c in cells})
    texts = {(c.cell.dataset, c.cell.context, c.cell.gamma, c.cell.threshold): speed(c) for c in cells}
    names = [f"γ = {g}" + (f", stop under {t:g}" if t else "") for g, t in lengths]
    return table(
        ["data", "context", *names, "best that stops ÷ best fixed"],
        [
            [
                *place,
                *(texts.get((*place, *length), "") for length in lengths),
                interval_text(early[place].ratio),
            ]
            for place in early
        ],
    )


def adaptive_words(early: Mapping[tuple[str, str], EarlyStop]) -> str:
    """In how many places stopping early is faster than the best fixed γ, and where intervals say so."""
    ratios = [stop.ratio for stop in early.values()]
    faster, clearly = sum(r.mean > 1 for r in ratios), sum(r.low > 1 for r in ratios)
    slower = sum(r.high < 1 for r in ratios)
    return (
        f"The best cell that stops early is faster than the best fixed γ in {faster} of {len(ratios)} "
        f"places, clearly in {clearly}, and clearly slower in {slower}; clearly means by the interval of "
        "the ratio over the same prompts."
    )


def advice_table(grid: Study) -> str:
    run_off = {row.cell: row for row in grid.run_off}
    measured = [row for row in grid.cells if row.mode == "measure"]
    latest = {row.cell: row for row in (*measured, *grid.again)}
    rows = []
    for advice in grid.summary.recommendations:
        choice, other = advice.choice or advice.runner_up, advice.runner_up if advice.choice else None
        what = "" if advice.choice else f"{advice.why}. The best: "
        rows.append(
            [
                advice.dataset,
                advice.context,
                what + (settings_text(choice.cell) if choice else ""),
                interval_text(choice.speedup) if choice else "",
                speed(run_off.get(choice.cell)) if choice else "",
                interval_text(choice.expected) if choice else "",
                "" if advice.best_again is None else f"{advice.best_again:.2f}",
                end_to_end(latest[choice.cell]) if choice else "",
                settings_text(other.cell) if other else "",
            ]
        )
    head = ["data", "context", "deploy", "first measured", "run-off", "on fresh repeats",
            "best on fresh repeats", "end to end", "runner-up"]  # fmt: skip
    return table(head, rows)


def advice_words(grid: Study) -> str:
    """How much the speedups of the same cells moved between two measurements with as many repeats."""
    raced = {row.cell: speedup_of(row) for row in grid.run_off}
    off = [abs(100 * (speedup_of(row) / raced[row.cell] - 1)) for row in grid.again if row.cell in raced]
    if not off:
        return ""
    return (
        f"From run-off to fresh repeats the speedups of these {len(off)} cells moved by {median(off):.1f} % "
        f"in the median and by {max(off):.1f} % at most. The clock of a shared machine drifts over minutes, "
        "which no interval here contains: they resample documents and repeats of one measurement."
    )
