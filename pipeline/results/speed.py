"""Decode speed from the measured rows: a cell against autoregressive (AR) decoding, and AR alone.

Intervals resample documents. Prompts that were decoded together share one clock, so the documents of a batch
are one unit, and so are all documents that a chain of batches links.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline import intervals
from pipeline.axes import Cell, Place
from pipeline.errors import BadData
from pipeline.metrics import sum_of_known
from pipeline.results.axes import Axes
from pipeline.results.summary import ArSpeed
from pipeline.store.rows import PromptRow, Speed, Timing


def clock_units(rows: Iterable[PromptRow]) -> dict[str, str]:
    """document_id → the name of its unit: the first, in order of ids, of the documents linked with it."""
    batches: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        batches[row.batch].add(row.document_id)
    units: dict[str, set[str]] = {}
    for documents in batches.values():
        linked = documents.union(*(units[document] for document in documents & units.keys()))
        units |= dict.fromkeys(linked, linked)
    return {document: min(linked) for document, linked in units.items()}


@dataclass(frozen=True)
class Batch:
    """Prompts of one measured cell that were decoded together: R repeats of one clock."""

    document: str
    tokens: int
    ar_tokens: int
    seconds_R: list[float]
    ar_seconds_R: list[float]
    prefill_s: float | None
    ar_prefill_s: float | None

    @staticmethod
    def of(rows: Sequence[PromptRow], timings: Sequence[Timing]) -> Batch:
        return Batch(
            document=rows[0].document_id,
            tokens=sum(decoded(row) for row in rows),
            ar_tokens=sum(timing.ar_num_tokens for timing in timings),
            seconds_R=[sum(repeat) for repeat in zip(*(t.decode_s for t in timings), strict=True)],
            ar_seconds_R=[sum(repeat) for repeat in zip(*(t.ar_decode_s for t in timings), strict=True)],
            prefill_s=sum_of_known(timing.prefill_s for timing in timings),
            ar_prefill_s=sum_of_known(timing.ar_prefill_s for timing in timings),
        )


def batches_of(cell: Cell, rows: Sequence[PromptRow]) -> list[Batch]:
    """The rows of a measured cell, grouped by the clock that they share.

    Raises:
        BadData: naming a prompt whose times do not fit those of the others.
    """
    grouped: dict[str, tuple[list[PromptRow], list[Timing]]] = defaultdict(lambda: ([], []))
    repeats = len(rows[0].timing.decode_s) if rows[0].timing else 0
    for row in rows:
        timing = row.timing
        counts = {len(timing.decode_s), len(timing.ar_decode_s)} if timing else set()
        if timing is None or not repeats or not timing.ar_num_tokens or counts != {repeats}:
            raise BadData(
                f"the measured prompt {row.prompt_id!r} of {cell} needs ar_num_tokens, and one time per "
                "repeat in decode_s and ar_decode_s, as many as the cell's other prompts: delete the "
                "measured rows in the sweep's folder and run the stage again"
            )
        prompts, timings = grouped[row.batch]
        prompts.append(row)
        timings.append(timing)
    return [Batch.of(*batch) for batch in grouped.values()]


def speed_of(cell: Cell, rows: Sequence[PromptRow], samples: int, seed: int) -> Speed:
    """Decode speed of a measured cell over the prompts that it was measured on."""
    batches, units = batches_of(cell, rows), clock_units(rows)
    clusters = [units[batch.document] for batch in batches]
    tokens, ar_tokens = [batch.tokens for batch in batches], [batch.ar_tokens for batch in batches]
    seconds, ar_seconds = [batch.seconds_R for batch in batches], [batch.ar_seconds_R for batch in batches]
    compare = partial(intervals.speedup, samples=samples, seed=seed, clusters=clusters)
    speed = compare((tokens, seconds), (ar_tokens, ar_seconds))
    end_to_end = None
    whole = with_prefills((batch.seconds_R, batch.prefill_s) for batch in batches)
    ar_whole = with_prefills((batch.ar_seconds_R, batch.ar_prefill_s) for batch in batches)
    if whole and ar_whole:
        end_to_end = compare((tokens, whole), (ar_tokens, ar_whole)).overall
    repeats = len(seconds[0])
    return Speed(
        speedup=speed.overall,
        worst_prompt_speedup=speed.worst_prompt,
        end_to_end=end_to_end,
        tokens_per_s=sum(tokens) * repeats / sum(map(sum, seconds)),
        ar_tokens_per_s=sum(ar_tokens) * repeats / sum(map(sum, ar_seconds)),
        num_clocked=len(set(units.values())),
    )


def decoded(row: PromptRow) -> int:
    """Tokens behind the first one, those after a divergence included: they took time too."""
    return row.counts.num_tokens + row.num_left_out


def with_prefills(times: Iterable[tuple[list[float], float | None]]) -> list[list[float]] | None:
    """Seconds of every repeat with the prefill, which ran once for all repeats; None if one was not timed."""
    whole = []
    for seconds_R, prefill_s in times:
        if prefill_s is None:
            return None
        whole.append([repeat + prefill_s for repeat in seconds_R])
    return whole


def ar_speeds(prompt_rows: Sequence[PromptRow], axes: Axes, samples: int, seed: int) -> list[ArSpeed]:
    """AR decode speed per data set, context and temperature, every interleaved run of a prompt counted."""
    places: dict[tuple[Place, float], list[tuple[PromptRow, Timing]]] = defaultdict(list)
    for row in prompt_rows:
        if row.timing is not None:
            places[row.cell.place, row.cell.temperature].append((row, row.timing))
    speeds = []
    for (place, temperature), timed in places.items():
        units = clock_units(row for row, _ in timed)
        speed = intervals.bootstrap_interval(
            [timing.ar_num_tokens * len(timing.ar_decode_s) for _, timing in timed],
            [sum(timing.ar_decode_s) for _, timing in timed],
            samples=samples,
            seed=seed,
            clusters=[units[row.document_id] for row, _ in timed],
        )
        prompts = {row.prompt_id for row, _ in timed}
        speeds.append(
            ArSpeed(
                dataset=place.dataset, context=place.context, temperature=temperature, speed=speed,
                num_prompts=len(prompts), num_documents=len(set(units.values())),
            )
        )  # fmt: skip
    order = {name: index for index, name in enumerate(axes.datasets)}
    return sorted(speeds, key=lambda s: (order[s.dataset], axes.contexts[s.context], s.temperature))
