"""Tables of the stage report: prompt rows pooled into cells, acceptance, speed and exactness.

`CellRow` (one line of `cells.jsonl`) is one cell in one mode. Data sets, contexts and policies are never
averaged together. Intervals resample documents: prompts of one document are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter

from pipeline import intervals
from pipeline.axes import Cell, Place
from pipeline.errors import BadData
from pipeline.metrics import Counts, Departure, Number
from pipeline.results.axes import Axes, Cells, PromptRows
from pipeline.results.speed import speed_of
from pipeline.results.summary import Estimate, Lossless, ReplayCheck
from pipeline.store.rows import CellRow, Mode, PromptRow, Timing

# Where a cell has rows of several modes, the later modes are preferred: they cover more prompts.
MODES: tuple[Mode, ...] = ("measure", "estimate", "replay")


def group(rows: Iterable[PromptRow], mode: Mode) -> Cells:
    """Rows of one mode by cell and prompt.

    Raises:
        BadData: if a prompt occurs twice in a cell.
    """
    cells: dict[Cell, PromptRows] = defaultdict(dict)
    for row in rows:
        if row.mode != mode:
            continue
        prompts = cells[row.cell]
        if row.prompt_id in prompts:
            raise BadData(
                f"the sweep holds prompt {row.prompt_id!r} twice for {row.cell} ({mode}): delete its "
                "rows/ folder and run the stage sweep again"
            )
        prompts[row.prompt_id] = row
    return dict(cells)


def replayed_or_measured(rows: Sequence[PromptRow]) -> Cells:
    """Rows by cell and prompt: replayed or estimated where there are any (they are more), else measured.

    Cells that stop drafting early are left out: what they propose depends on the drafter's confidence, so
    that their acceptance cannot be compared. So are those of a lossy rule, whose texts are others.
    """
    cells = group(rows, "measure") | group(rows, "estimate") | group(rows, "replay")
    return {cell: prompts for cell, prompts in cells.items() if not cell.threshold and not cell.lossy}


def accepted_of_proposed(rows: Sequence[PromptRow]) -> tuple[list[Number], list[Number]]:
    """Accepted and proposed tokens of each row; all rows must know what they proposed."""
    proposed = [row.counts.num_proposed for row in rows if row.counts.num_proposed is not None]
    assert len(proposed) == len(rows), "replay does not know what was proposed where drafting stops early"
    return [row.counts.num_accepted for row in rows], proposed


def nothing_proposed(rows: Iterable[PromptRow]) -> bool:
    """Because every continuation ended at once, or a draft source found nothing to propose."""
    return all(row.counts.num_proposed == 0 for row in rows)


def documents(rows: Sequence[PromptRow]) -> list[str]:
    """The document of every row: what intervals resample."""
    return [row.document_id for row in rows]


def cell_rows(prompt_rows: Sequence[PromptRow], axes: Axes, samples: int, seed: int) -> list[CellRow]:
    """Pool the prompts of every cell and mode, in the order of `axes`.

    A cell in which nothing was proposed has no acceptance and is left out; the findings count such cells.
    """
    cells = [
        _cell_row(cell, mode, list(rows.values()), samples, seed)
        for mode in MODES
        for cell, rows in group(prompt_rows, mode).items()
        if not nothing_proposed(rows.values())
    ]
    return sorted(cells, key=lambda row: axes.order(row.cell))


def _cell_row(cell: Cell, mode: Mode, rows: list[PromptRow], samples: int, seed: int) -> CellRow:
    pooled = Counts.pooled([row.counts for row in rows])
    acceptance, not_looping = None, None
    if pooled.num_proposed is not None:
        acceptance = intervals.bootstrap_interval(
            *accepted_of_proposed(rows), samples=samples, seed=seed, clusters=documents(rows)
        )
        not_looping = Counts.pooled([row.counts for row in rows if not row.looping]).acceptance
    timings = [row.timing for row in rows if row.timing]
    departures = [row.departure for row in rows if row.departure]
    compared = [timing.exact for timing in timings if timing.exact is not None]
    return CellRow(
        cell=cell,
        mode=mode,
        num_prompts=len(rows),
        num_documents=len(set(documents(rows))),
        num_looping=sum(row.looping for row in rows),
        num_left_out=sum(row.num_left_out for row in rows),
        acceptance=acceptance,
        acceptance_not_looping=not_looping,
        mean_tokens_per_round=pooled.tau,
        conditional_acceptance=pooled.conditional_acceptance,
        in_trained_range=all(row.in_trained_range for row in rows),
        drafter_kv_bytes=max(row.drafter_kv_bytes for row in rows),
        target_kv_bytes=_most(timing.target_kv_bytes for timing in timings),
        exact_prompts=sum(compared) if compared else None,
        prompts_together=max((timing.prompts_together for timing in timings), default=1),
        peak_memory_bytes=_most(timing.peak_memory_bytes for timing in timings),
        speed=speed_of(cell, rows, samples, seed) if mode == "measure" else None,
        departure=Departure.pooled(departures) if departures else None,
    )


def _most(values: Iterable[int | None]) -> int | None:
    """The largest of the values that were taken; None where none was."""
    taken = [value for value in values if value is not None]
    return max(taken) if taken else None


def acceptances(cells: Sequence[CellRow]) -> list[Estimate]:
    """Acceptance of every exact cell: replayed or estimated where it was, else measured."""
    chosen: dict[Cell, CellRow] = {}
    for row in cells:
        present = chosen.get(row.cell)
        if row.cell.threshold or row.cell.lossy:
            continue
        if not present or MODES.index(present.mode) < MODES.index(row.mode):
            chosen[row.cell] = row
    return [
        Estimate(
            cell=cell, value=row.acceptance, num_prompts=row.num_prompts, num_documents=row.num_documents
        )
        for cell, row in chosen.items()
        if row.acceptance is not None
    ]


def speedups(cells: Sequence[CellRow]) -> list[Estimate]:
    """Speedup of every measured exact cell."""
    return [
        Estimate(
            cell=row.cell,
            value=row.speed.speedup,
            num_prompts=row.num_prompts,
            num_documents=row.speed.num_clocked,
        )
        for row in cells
        if row.speed is not None and not row.cell.lossy
    ]


def lossless(prompt_rows: Sequence[PromptRow]) -> Lossless:
    exact: dict[tuple[Place, str], bool] = {}
    excused: dict[tuple[Place, str], bool] = {}
    for row in prompt_rows:
        timing = row.timing
        if row.cell.temperature == 0 and timing is not None and timing.exact is not None:
            prompt = (row.cell.place, row.prompt_id)
            exact[prompt] = exact.get(prompt, True) and timing.exact
            excused[prompt] = excused.get(prompt, True) and (timing.exact or near_tie(timing))
    explained = sum(excused[prompt] and not exact[prompt] for prompt in exact)
    left_out = sum(row.num_left_out for row in prompt_rows)
    return Lossless(
        prompts=len(exact), exact=sum(exact.values()), explained=explained, left_out_tokens=left_out
    )


def near_tie(timing: Timing) -> bool:
    """Whether the noise of the logits explains where a text parts from autoregressive decoding's."""
    gap, noise = timing.divergence_gap, timing.logit_noise
    return gap is not None and noise is not None and gap < noise


def replay_check(prompt_rows: Sequence[PromptRow], again: Iterable[Sequence[PromptRow]] = ()) -> ReplayCheck:
    """Compare the counts of replay with those of every decoding of the same prompt.

    Args:
        again: rows of the cells that were measured again, each time by itself.
    """
    replayed = group(prompt_rows, "replay")
    pairs = [
        (row.counts, replayed[cell][prompt].counts)
        for rows in (prompt_rows, *again)
        for cell, prompts in group(rows, "measure").items()
        for prompt, row in prompts.items()
        if cell.temperature == 0 and prompt in replayed.get(cell, {}) and not row.num_left_out
    ]
    counted = attrgetter("num_rounds", "num_accepted", "kept")
    equal = sum(
        counted(decoded) == counted(replay) and replay.num_proposed in (None, decoded.num_proposed)
        for decoded, replay in pairs
    )
    return ReplayCheck(rows=len(pairs), equal=equal)
