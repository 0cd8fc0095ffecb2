"""What a real target's study was to reach, beside what it reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.page_parts import points
from benchmarks.real_study.tables import (
    OURS,
    PLAIN,
    beside,
    compared,
    fastest,
    leading_gamma,
    replayed,
    smallest,
)
from benchmarks.study.runs import Study
from benchmarks.study.tables import when
from pipeline.axes import Place, budget_text, family
from pipeline.intervals import Interval
from pipeline.results.recommend import settings_text
from pipeline.results.summary import Check
from pipeline.store.rows import CellRow

LOOPING, FASTER, ENOUGH = 0.3, 1.4, 20


def all_checks(run: Study, costs: Path | None) -> list[Check]:
    return [
        *own(run),
        *looping(run),
        *faster(run),
        *half_of_the_places(run),
        *gained(run),
        *costs_of_steps(costs),
    ]


def own(run: Study) -> Iterator[Check]:
    """That texts are the target's and that replay counts as decoding does."""
    exact, replay = run.summary.lossless, run.summary.replay_check
    if not exact.prompts:
        return  # nothing was decoded
    yield Check(
        row="measured texts equal to autoregressive decoding",
        value=(exact.exact + exact.explained) / exact.prompts,
        target="1",
        met=exact.exact + exact.explained == exact.prompts,
        note=f"{exact.exact} of {exact.prompts} token for token, {exact.explained} more up to two logits "
        "within their noise",
    )
    yield Check(
        row="replay = decoding, prompt rows that were both replayed and measured",
        value=replay.equal / replay.rows if replay.rows else None,
        target="1",
        met=replay.equal == replay.rows if replay.rows else None,
        note=f"{replay.equal} of {replay.rows}",
    )


def looping(run: Study) -> Iterator[Check]:
    """A place where most texts loop says little about texts that people want."""
    seen: dict[Place, CellRow] = {}
    for row in replayed(run, 0.0, control=None):
        seen.setdefault(row.cell.place, row)
    for place, row in seen.items():
        share = row.num_looping / row.num_prompts
        yield Check(
            row=f"looping texts, {' '.join(place)}",
            value=share,
            target=f"at most {LOOPING:g}, or it is no headline",
            met=enough(row.num_documents, share <= LOOPING),
            note=f"{row.num_looping} of {row.num_prompts} texts of {run.config.data.max_new_tokens} tokens"
            + few(row.num_documents),
        )


def judged(row: str, value: Interval, target: str, met: bool | None, note: str) -> Check:
    """A check of a value with its interval."""
    return Check(row=row, value=value.mean, low=value.low, high=value.high, target=target, met=met, note=note)


def few(documents: int) -> str:
    return "" if documents >= ENOUGH else f"; too few documents for a verdict: {documents} of {ENOUGH}"


def enough(documents: int, met: bool) -> bool | None:
    return met if documents >= ENOUGH else None


def faster(run: Study) -> Iterator[Check]:
    """Speed of the fastest measured cell against autoregressive decoding."""
    again = {row.cell: row for row in run.again}
    for row in fastest(run.cells):
        best = again.get(row.cell, row)
        assert best.speed is not None
        value = best.speed.speedup
        yield judged(
            row=f"fastest measured ÷ AR, {' '.join(row.cell.place)}",
            value=value,
            target=f"at least {FASTER:g} by its interval, on fresh repeats",
            met=value.low >= FASTER if row.cell in again else None,
            note=f"{settings_text(row.cell)}; {best.speed.num_clocked} documents, "
            + (
                "fresh repeats" if row.cell in again else "measured once, and picked for it: no fresh repeats"
            ),
        )


def gained(run: Study) -> Iterator[Check]:
    """Whether several views are worth it behind the smallest budget, and whether the context is why."""
    for gain in compared(run):
        where = f"{' '.join(gain.cell.place)}, {when(gain.cell.temperature)}"
        other = beside(run, gain, control="other_prompt")
        yield judged(
            row=f"{OURS} − {PLAIN} at {budget_text(smallest(run))}, {where}",
            value=gain.value,
            target="above 0 by its interval",
            met=enough(gain.num_documents, gain.value.low > 0),
            note=f"{points(gain.value)} points"
            + (f", of which {points(other.lost)} need the context" if other and other.lost else "")
            + few(gain.num_documents),
        )
    for gap in run.summary.controls:
        cell = gap.cell
        wanted = OURS, "other_prompt", leading_gamma(run), smallest(run)
        if (family(cell.drafter), cell.control, cell.gamma, cell.budget) == wanted:
            yield judged(
                row=f"{OURS}, own − other document's context at {budget_text(smallest(run))}, "
                f"{' '.join(cell.place)}, {when(cell.temperature)}",
                value=gap.value,
                target="above 0 by its interval",
                met=enough(gap.num_documents, gap.value.low > 0),
                note=f"{points(gap.value)} points" + few(gap.num_documents),
            )


def half_of_the_places(run: Study) -> Iterator[Check]:
    """Of the places with enough documents, in how many several views are worth it, and use the context."""
    for temperature in run.config.sweep.temperatures:
        gains = [g for g in compared(run) if g.cell.temperature == temperature and g.num_documents >= ENOUGH]
        if gains:
            clear = sum(gain.value.low > 0 for gain in gains)
            yield Check(
                row=f"places where {OURS} is clearly above {PLAIN} at {budget_text(smallest(run))}, "
                f"{when(temperature)}",
                value=clear / len(gains),
                target="at least half",
                met=2 * clear >= len(gains),
                note=f"{clear} of {len(gains)} places with {ENOUGH} documents or more",
            )


def costs_of_steps(file: Path | None) -> Iterator[Check]:
    """Rows of `python -m benchmarks --only real`: what a step costs."""
    for row in json.loads(file.read_text(encoding="utf-8")) if file else []:
        if row["target"] is not None:
            yield Check(
                row=row["row"],
                value=row["value"],
                low=row["low"],
                high=row["high"],
                target=f"at {'most' if row['at_most'] else 'least'} {row['target']:g}",
                met=row["met"],
                note=row["note"],
            )
