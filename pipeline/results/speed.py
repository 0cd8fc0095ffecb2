"""Decode speed from the measured rows: a cell against autoregressive (AR) decoding, and AR alone.

Intervals resample documents. Prompts that were decoded together share one clock, so where a batch spans
documents these are one unit, and so are all documents that batches link.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial

from pipeline import intervals
from pipeline.axes import CellKey
from pipeline.errors import BadData
from pipeline.results.axes import Axes
from pipeline.results.summary import ArSpeed
from pipeline.store.rows import PromptRow


def clock_units(rows: Iterable[PromptRow]) -> dict[str, str]:
    """document_id → the name of its unit: the least document of those that batches link with it."""
    batches: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        batches[row.together_with or row.prompt_id].add(row.document_id)
    units: dict[str, set[str]] = {}
    for documents in batches.values():
        linked = documents.union(*(units[document] for document in documents & units.keys()))
        units |= dict.fromkeys(linked, linked)
    return {document: min(linked) for document, linked in units.items()}


def speed_fields(key: CellKey, rows: Sequence[PromptRow], samples: int, seed: int) -> dict[str, float | None]:
    """The speed fields of a measured cell's `CellRow`."""
    repeats = len(rows[0].decode_s)
    for row in rows:
        if not repeats or not row.ar_num_tokens or {len(row.decode_s), len(row.ar_decode_s)} != {repeats}:
            raise BadData(
                f"the measured prompt {row.prompt_id!r} of {key} needs ar_num_tokens, and one time per "
                "repeat in decode_s and ar_decode_s, as many as the cell's other prompts: delete the "
                "measured rows in the sweep's folder and run the stage again"
            )
    batches: dict[str, list[PromptRow]] = defaultdict(list)
    for row in rows:
        batches[row.together_with or row.prompt_id].append(row)
    units = clock_units(rows)
    clusters = [units[batch[0].document_id] for batch in batches.values()]
    tokens = [sum(decoded(row) for row in batch) for batch in batches.values()]
    ar_tokens = [sum(row.ar_num_tokens or 0 for row in batch) for batch in batches.values()]
    seconds = [_sums(row.decode_s for row in batch) for batch in batches.values()]
    ar_seconds = [_sums(row.ar_decode_s for row in batch) for batch in batches.values()]
    compare = partial(intervals.speedup, samples=samples, seed=seed, clusters=clusters)
    speed = compare((tokens, seconds), (ar_tokens, ar_seconds))
    end_to_end = None
    prefills = [_total(row.prefill_s for row in batch) for batch in batches.values()]
    ar_prefills = [_total(row.ar_prefill_s for row in batch) for batch in batches.values()]
    if None not in (*prefills, *ar_prefills):
        whole, ar_whole = _later(seconds, prefills), _later(ar_seconds, ar_prefills)
        end_to_end = compare((tokens, whole), (ar_tokens, ar_whole)).overall
    return {
        "speedup": speed.overall.mean,
        "speedup_low": speed.overall.low,
        "speedup_high": speed.overall.high,
        "worst_prompt_speedup": speed.worst_prompt,
        "end_to_end_speedup": end_to_end.mean if end_to_end else None,
        "end_to_end_low": end_to_end.low if end_to_end else None,
        "end_to_end_high": end_to_end.high if end_to_end else None,
        "tokens_per_s": sum(tokens) * repeats / sum(map(sum, seconds)),
        "ar_tokens_per_s": sum(ar_tokens) * repeats / sum(map(sum, ar_seconds)),
    }


def decoded(row: PromptRow) -> int:
    """Tokens behind the first, those after a divergence included: they took their time too."""
    return row.num_tokens + row.num_left_out


def _sums(times: Iterable[list[float]]) -> list[float]:
    """Repeat by repeat."""
    return [sum(repeat) for repeat in zip(*times, strict=True)]


def _later(seconds: Sequence[list[float]], prefills: Sequence[float | None]) -> list[list[float]]:
    """Every repeat with the seconds of its batch's prefill, which is run once for all of them."""
    return [[one + (first or 0.0) for one in times] for times, first in zip(seconds, prefills, strict=True)]


def _total(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a value is missing."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def ar_speeds(prompt_rows: Sequence[PromptRow], axes: Axes, samples: int, seed: int) -> list[ArSpeed]:
    """AR decode speed per data set, context and temperature, every interleaved run of a prompt counted."""
    places: dict[tuple[str, str, float], list[PromptRow]] = defaultdict(list)
    for row in prompt_rows:
        if row.ar_decode_s:
            places[row.dataset, row.context, row.temperature].append(row)
    speeds = []
    for (dataset, context, temperature), rows in places.items():
        units = clock_units(rows)
        speed = intervals.bootstrap_interval(
            [(row.ar_num_tokens or 0) * len(row.ar_decode_s) for row in rows],
            [sum(row.ar_decode_s) for row in rows],
            samples=samples,
            seed=seed,
            clusters=[units[row.document_id] for row in rows],
        )
        speeds.append(
            ArSpeed(
                dataset=dataset, context=context, temperature=temperature,
                mean=speed.mean, low=speed.low, high=speed.high,
                num_prompts=len({row.prompt_id for row in rows}), num_documents=len(set(units.values())),
            )
        )  # fmt: skip
    order = {name: index for index, name in enumerate(axes.datasets)}
    return sorted(speeds, key=lambda s: (order[s.dataset], axes.contexts[s.context], s.temperature))
