"""Training documents that also occur in the evaluation data are found here.

Texts are compared by their words alone (case, punctuation, white space and line wraps do not count): every
run of SHINGLE words is hashed, and one hash in SAMPLE is kept, the same ones in every text. A training
document is contaminated when the share THRESHOLD of its own kept hashes is also an evaluation document's (a
copy, an excerpt), or when it has that share of an evaluation document's (a collection), of those at least
LEAST: else a test document that is little more than a licence header would empty the training split.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from pathlib import Path

import numpy as np

from pipeline.data.documents import Part, read_parts
from pipeline.store.files import atomic_path, write_text
from pipeline.store.rows import Row

SHINGLE = 8
SAMPLE = 4
THRESHOLD = 0.3
LEAST = 16
WORD = re.compile(r"\w+")
INDEX = "evaluation.npz"


class Contaminated(Row):
    """The documents of one file to drop, each with the evaluation document that it shares text with."""

    file: str
    dropped: dict[str, str]


def shingles(text: str) -> np.ndarray:
    """Sampled hashes [n] uint64, sorted and unique, of the runs of SHINGLE words of `text`."""
    words = WORD.findall(text.casefold())
    if not words:
        return np.empty(0, np.uint64)
    number = {word: word_hash(word) for word in set(words)}
    hashes = np.array([number[word] for word in words], np.uint64)
    width = min(SHINGLE, len(words))
    runs = np.zeros(len(words) - width + 1, np.uint64)
    for k in range(width):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[k : k + len(runs)]
    runs ^= runs >> np.uint64(31)
    runs *= np.uint64(0xBF58476D1CE4E5B9)
    runs ^= runs >> np.uint64(29)
    return np.unique(runs[runs % np.uint64(SAMPLE) == 0])


def word_hash(word: str) -> int:
    """A 64-bit hash that is the same in every process, unlike `hash`."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def index_evaluation(folder: Path, parts: list[Part]) -> Path:
    """Write the hashes of all evaluation documents, for the tasks of `find_contaminated`."""
    file = folder / INDEX
    if file.exists():
        return file
    ids: list[str] = []
    found: list[np.ndarray] = []
    for document in read_parts(folder, parts):
        ids.append(document.document_id)
        found.append(shingles(document.text))
    sizes = np.array([len(own) for own in found], np.int64)
    hashes = np.concatenate([np.empty(0, np.uint64), *found])
    owners = np.repeat(np.arange(len(found)), sizes)
    order = np.argsort(hashes, kind="stable")
    with atomic_path(file) as temporary, temporary.open("wb") as handle:
        np.savez(handle, hashes=hashes[order], owners=owners[order], sizes=sizes, ids=np.array(ids, np.str_))
    return file


def find_contaminated(folder: Path, part: Part) -> Contaminated:
    """The contaminated documents of one training file; kept beside it, so that it is not done twice."""
    result_file = folder / f"{part.file}.contaminated.json"
    if result_file.exists():
        return Contaminated.model_validate_json(result_file.read_text(encoding="utf-8"))
    with np.load(folder / INDEX) as index:
        hashes, owners, sizes, ids = index["hashes"], index["owners"], index["sizes"], index["ids"]
    dropped = {}
    for document in read_parts(folder, [part]):
        own = shingles(document.text)
        first = np.searchsorted(hashes, own, side="left")
        last = np.searchsorted(hashes, own, side="right")
        hits = np.concatenate(
            [np.empty(0, np.int64), *(owners[a:b] for a, b in zip(first, last, strict=True) if b > a)]
        )
        shared = np.bincount(hits, minlength=len(sizes))
        of_evaluation = np.where(shared >= LEAST, shared / np.maximum(sizes, 1), 0)
        share = np.maximum(shared / max(len(own), 1), of_evaluation)
        if len(share) and share.max() >= THRESHOLD:
            dropped[document.document_id] = str(ids[share.argmax()])
    result = Contaminated(file=part.file, dropped=dropped)
    write_text(result_file, result.model_dump_json() + "\n")
    return result
