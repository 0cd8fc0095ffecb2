"""Tables of the stage report: prompt rows pooled into cells, acceptance, speed and exactness.

`CellRow` (one line of `cells.jsonl`) is one cell in one mode. Data sets, contexts and policies are never
averaged together. Intervals resample documents: prompts of one document are alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import attrgetter

from pipeline import intervals, metrics
from pipeline.axes import CellKey
from pipeline.errors import BadData
from pipeline.results.axes import Axes, Cells, PromptRows
from pipeline.results.speed import clock_units, speed_fields
from pipeline.results.summary import Estimate, Lossless, ReplayCheck
from pipeline.store.rows import CellRow, Count, Mode, PromptRow

# Later ones are preferred where a cell was told of in several ways: they cover more prompts.
MODES: tuple[Mode, ...] = ("measure", "estimate", "replay")


def group(rows: Iterable[PromptRow], mode: Mode) -> Cells:
    """Rows of one mode by cell and prompt.

    Raises:
        BadData: if a prompt occurs twice in a cell.
    """
    cells: dict[CellKey, PromptRows] = defaultdict(dict)
    for row in rows:
        if row.mode != mode:
            continue
        prompts = cells[CellKey.of(row)]
        if row.prompt_id in prompts:
            raise BadData(
                f"the sweep holds prompt {row.prompt_id!r} twice for {CellKey.of(row)} ({mode}): delete its "
                "rows/ folder and run the stage sweep again"
            )
        prompts[row.prompt_id] = row
    return dict(cells)


def replayed_or_measured(rows: Sequence[PromptRow]) -> Cells:
    """Rows by cell and prompt: replayed or estimated where there are any (they are more), else measured.

    Without the cells that stop drafting early: what they propose depends on the drafter's confidence, so that
    their acceptance compares with nothing.
    """
    cells = group(rows, "measure") | group(rows, "estimate") | group(rows, "replay")
    return {key: prompts for key, prompts in cells.items() if not key.threshold}


def accepted_of_proposed(rows: Sequence[PromptRow]) -> tuple[list[Count], list[Count]]:
    """Of rows that know what they proposed."""
    proposed = [row.num_proposed for row in rows if row.num_proposed is not None]
    assert len(proposed) == len(rows), "replay does not know what was proposed where drafting stops early"
    return [row.num_accepted for row in rows], proposed


def documents(rows: Sequence[PromptRow]) -> list[str]:
    """The document of every row: what intervals resample."""
    return [row.document_id for row in rows]


def cell_rows(prompt_rows: Sequence[PromptRow], axes: Axes, samples: int, seed: int) -> list[CellRow]:
    """Pool the prompts of every cell and mode, in the order of `axes`.

    A cell in which nothing was proposed, because every continuation ended at once, has no acceptance and is
    left out; the findings count such cells.
    """
    cells = [
        _cell_row(key, mode, list(rows.values()), samples, seed)
        for mode in MODES
        for key, rows in group(prompt_rows, mode).items()
        if any(row.num_proposed != 0 for row in rows.values())
    ]
    return sorted(cells, key=axes.order)


def _cell_row(key: CellKey, mode: Mode, rows: list[PromptRow], samples: int, seed: int) -> CellRow:
    acceptance, not_looping = None, None
    if all(row.num_proposed is not None for row in rows):
        acceptance = intervals.bootstrap_interval(
            *accepted_of_proposed(rows), samples=samples, seed=seed, clusters=documents(rows)
        )
        accepted, proposed = accepted_of_proposed([row for row in rows if not row.looping])
        not_looping = sum(accepted) / sum(proposed) if sum(proposed) else None
    compared = [row for row in rows if row.exact is not None]
    cell = CellRow(
        **key._asdict(),
        mode=mode,
        num_prompts=len(rows),
        num_documents=len(set(documents(rows))),
        num_looping=sum(row.looping for row in rows),
        num_left_out=sum(row.num_left_out for row in rows),
        acceptance=acceptance.mean if acceptance else None,
        acceptance_low=acceptance.low if acceptance else None,
        acceptance_high=acceptance.high if acceptance else None,
        acceptance_not_looping=not_looping,
        mean_tokens_per_round=sum(row.num_tokens for row in rows) / sum(row.num_rounds for row in rows),
        conditional_acceptance=metrics.conditional_acceptance(
            [row.reached for row in rows], [row.kept for row in rows]
        ),
        in_trained_range=all(row.in_trained_range for row in rows),
        drafter_kv_bytes=max(row.drafter_kv_bytes for row in rows),
        target_kv_bytes=_most(row.target_kv_bytes for row in rows),
        exact_prompts=sum(row.exact is True for row in compared) if compared else None,
        prompts_together=max(row.prompts_together for row in rows),
        peak_memory_bytes=_most(row.peak_memory_bytes for row in rows),
    )
    if mode != "measure":
        return cell
    clocked = {"num_clocked": len(set(clock_units(rows).values()))}
    return cell.model_copy(update=clocked | speed_fields(key, rows, samples, seed))


def _most(values: Iterable[int | None]) -> int | None:
    """The largest of the values that were taken; None where none was."""
    taken = [value for value in values if value is not None]
    return max(taken) if taken else None


def acceptances(cells: Sequence[CellRow]) -> list[Estimate]:
    """Acceptance of every cell: replayed or estimated where it was, else measured."""
    chosen: dict[CellKey, CellRow] = {}
    for cell in cells:
        present = chosen.get(CellKey.of(cell))
        if not cell.threshold and (not present or MODES.index(present.mode) < MODES.index(cell.mode)):
            chosen[CellKey.of(cell)] = cell
    return [
        Estimate(
            **key._asdict(),
            mean=cell.acceptance,
            low=cell.acceptance_low,
            high=cell.acceptance_high,
            num_prompts=cell.num_prompts,
            num_documents=cell.num_documents,
        )
        for key, cell in chosen.items()
        if cell.acceptance is not None
        and cell.acceptance_low is not None
        and cell.acceptance_high is not None
    ]


def speedups(cells: Sequence[CellRow]) -> list[Estimate]:
    """Speedup of every measured cell."""
    return [
        Estimate(
            **CellKey.of(cell)._asdict(),
            mean=cell.speedup,
            low=cell.speedup_low,
            high=cell.speedup_high,
            num_prompts=cell.num_prompts,
            num_documents=cell.num_clocked or cell.num_documents,
        )
        for cell in cells
        if cell.speedup is not None and cell.speedup_low is not None and cell.speedup_high is not None
    ]


def lossless(prompt_rows: Sequence[PromptRow]) -> Lossless:
    exact: dict[tuple[str, str, str], bool] = {}
    excused: dict[tuple[str, str, str], bool] = {}
    for row in prompt_rows:
        if row.temperature == 0 and row.exact is not None:
            prompt = (row.dataset, row.context, row.prompt_id)
            exact[prompt] = exact.get(prompt, True) and row.exact
            near_tie = row.exact or (row.divergence_gap or 0.0) < (row.logit_noise or 0.0)
            excused[prompt] = excused.get(prompt, True) and near_tie
    explained = sum(excused[prompt] and not exact[prompt] for prompt in exact)
    left_out = sum(row.num_left_out for row in prompt_rows)
    return Lossless(
        prompts=len(exact), exact=sum(exact.values()), explained=explained, left_out_tokens=left_out
    )


def replay_check(prompt_rows: Sequence[PromptRow], again: Iterable[Sequence[PromptRow]] = ()) -> ReplayCheck:
    """Counts of replay against those of every decoding of a prompt.

    Args:
        again: rows of the cells that were measured again, each time by itself.
    """
    replayed = group(prompt_rows, "replay")
    pairs = [
        (row, replayed[key][prompt])
        for rows in (prompt_rows, *again)
        for key, prompts in group(rows, "measure").items()
        for prompt, row in prompts.items()
        if key.temperature == 0 and prompt in replayed.get(key, {}) and not row.num_left_out
    ]
    counts = attrgetter("num_rounds", "num_accepted", "kept")
    equal = sum(
        counts(decoded) == counts(replay) and replay.num_proposed in (None, decoded.num_proposed)
        for decoded, replay in pairs
    )
    return ReplayCheck(rows=len(pairs), equal=equal)
