"""Training sequences: pieces of documents, packed in two passes.

A document is cut into non-overlapping pieces; each, after BOS, is one sequence of exactly `sequence_tokens`,
and what is left at a document's end is not used: no sequence crosses documents. Packing takes two passes, the
first to count: only then can `max_sequences` be shared evenly over documents of unequal length.
"""

from __future__ import annotations

import shutil
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.documents import Part, read_parts
from pipeline.data.tokenizer import beginning, encode, read_tokenizer
from pipeline.store.files import write_array, write_json, write_text
from pipeline.store.layout import DOCUMENTS, PIECES, SEQUENCES, TOKENIZER
from pipeline.store.rows import Row


class EncodedPart(Row):
    """The pieces of one file of documents: `counts[i]` belong to `documents[i]`."""

    file: str
    documents: list[str]
    counts: list[int]
    num_too_short: int


@dataclass(frozen=True)
class Packing:
    """One file of sequences: `takes[i]` of the pieces of each document of an encoded part."""

    number: int
    part: EncodedPart
    takes: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"train-{self.number:05d}"


def encode_part(folder: Path, sequence_tokens: int, item: tuple[Part, Set[str]]) -> EncodedPart:
    """Encode one file of documents, without the dropped ones, into pieces [n, sequence_tokens]."""
    part, dropped = item
    result_file = folder / PIECES / f"{part.file}.json"
    if result_file.exists():
        return EncodedPart.model_validate_json(result_file.read_text(encoding="utf-8"))
    tokenizer = read_tokenizer(folder / TOKENIZER)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    head = beginning(tokenizer)
    length = sequence_tokens - len(head)
    arrays = [np.empty((0, sequence_tokens), dtype)]
    documents: list[str] = []
    counts: list[int] = []
    num_too_short = 0
    for document in read_parts(folder / DOCUMENTS, [part], {part.file: dropped}):
        tokens = np.asarray(encode(tokenizer, document.text), dtype)
        count = len(tokens) // length
        if count == 0:
            num_too_short += 1
            continue
        pieces = np.empty((count, sequence_tokens), dtype)
        pieces[:, : len(head)] = head
        pieces[:, len(head) :] = tokens[: count * length].reshape(count, length)
        arrays.append(pieces)
        documents.append(document.document_id)
        counts.append(count)
    write_array(folder / PIECES / f"{part.file}.npy", np.concatenate(arrays))
    result = EncodedPart(file=part.file, documents=documents, counts=counts, num_too_short=num_too_short)
    write_text(result_file, result.model_dump_json() + "\n")
    return result


def share_evenly(counts: list[int], most: int) -> list[int]:
    """How many of each document's pieces to take: all, or `most` in all with the largest takes levelled.

    The level is the highest that fits; what it leaves over goes, one each, to documents that have more,
    evenly spaced among them.
    """
    if sum(counts) <= most:
        return list(counts)
    low, high = 0, max(counts)
    while low < high:
        level = (low + high + 1) // 2
        if sum(min(count, level) for count in counts) <= most:
            low = level
        else:
            high = level - 1
    takes = [min(count, low) for count in counts]
    longer = [i for i, count in enumerate(counts) if count > low]
    rest = most - sum(takes)
    for k in range(rest):
        takes[longer[k * len(longer) // rest]] += 1
    return takes


def plan_packing(parts: list[EncodedPart], max_sequences: int) -> list[Packing]:
    """The files of sequences to write, numbered from 0; parts that give none are left out."""
    takes = share_evenly([count for part in parts for count in part.counts], max_sequences)
    plans: list[Packing] = []
    for part in parts:
        own, takes = takes[: len(part.counts)], takes[len(part.counts) :]
        if any(own):
            plans.append(Packing(len(plans), part, tuple(own)))
    return plans


def pack(folder: Path, plan: Packing) -> int:
    """Write one file of sequences and the document of each; returns how many."""
    name = folder / SEQUENCES / plan.name
    ids_file = name.with_name(f"{name.name}.documents.json")
    if not ids_file.exists():
        pieces = np.load(folder / PIECES / f"{plan.part.file}.npy", mmap_mode="r")
        chosen: list[int] = []
        start = 0
        for count, take in zip(plan.part.counts, plan.takes, strict=True):
            chosen += [start + k * count // take for k in range(take)]
            start += count
        ids = [d for d, take in zip(plan.part.documents, plan.takes, strict=True) for _ in range(take)]
        write_array(name.with_name(f"{name.name}.npy"), np.asarray(pieces[chosen]))
        write_json(ids_file, ids)
    return sum(plan.takes)


def remove_pieces(folder: Path) -> None:
    """Remove what the two passes handed over."""
    shutil.rmtree(folder / PIECES, ignore_errors=True)
