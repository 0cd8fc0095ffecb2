"""Documents: what every source is read into, and the interface that a source implements.

One shard is read by one task into `documents/<source>-<split>-<shard>-<part>.jsonl`, at most
`documents_per_shard` documents a part, so that no task holds more than that; the shard's summary is written
last and marks it as done.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import Field, field_validator

from pipeline.config.data import Context, Data, Source, Split
from pipeline.data.reading import COMPRESSED, EXPANSION, BadRow, Table, looks_local
from pipeline.errors import BadData
from pipeline.store.files import read_rows, write_rows, write_text
from pipeline.store.rows import Prompt, Row
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SourceT = TypeVar("SourceT", bound=Source)
MIN_CHARS = 16
BYTE_ORDER_MARK = "\ufeff"
OFFENDERS = 5
NO_LIMIT = 1_000_000_000
# Documents that are left out, by the file that they are in: ids are unique within a file.
Dropped = Mapping[str, Set[str]]


class Document(Row):
    """One text. A templated prompt is `before + text + after`; `messages` is a chat that replaces them.

    `messages` and `tools` are as chat templates take them. `where` is the file and line of a user's row.
    """

    document_id: str
    source: str
    split: Split
    text: str
    before: str = ""
    after: str = ""
    answers: list[str] = Field(default_factory=list)
    max_new_tokens: int | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    where: str = ""

    @field_validator("text")
    @classmethod
    def _without_byte_order_mark(cls, text: str) -> str:
        return text.lstrip(BYTE_ORDER_MARK)


class DocumentNote(Row):
    """What the driver knows of a document: `digest` is of its text."""

    document_id: str
    digest: str


class Part(Row):
    """One file of documents, by its name in `documents/`."""

    file: str
    source: str
    split: Split
    documents: list[DocumentNote]


class ShardSummary(Row):
    """What one task read: its parts, its rows, and its bad rows by reason with the first offenders."""

    source: str
    parts: list[Part]
    num_rows: int
    bad: dict[str, int]
    offenders: list[str]


@dataclass(frozen=True)
class Shard:
    """A unit of reading. `split` is None where the content decides; `rows` picks rows of the tables."""

    source: str
    split: Split | None
    index: int
    tables: tuple[Table, ...]
    rows: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        return f"{self.source}-{self.split or 'any'}-{self.index:05d}"


@dataclass
class Request:
    """Evaluation prompts to make: at most `count`, at most `per_document` from one document.

    `skipped` collects the documents that gave no prompt, by reason.
    """

    dataset: str
    split: Split
    context: Context
    count: int
    per_document: int
    max_new_tokens: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    skipped: Counter[str] = field(default_factory=Counter)


class Reader(ABC, Generic[SourceT]):
    """A data set: its shards, its documents, and its evaluation prompts. One file of this folder each."""

    # Whether its prompts are plain text to be continued; the validation curve prefers those.
    continues_text: bool = False
    # Whether training is on the target's own answers to its prompts, not on its texts.
    answered: bool = False
    # Whether each of its files is one document.
    whole_files: bool = False

    def __init__(self, source: SourceT, data: Data, seed: int) -> None:
        self.source = source
        self.data = data
        self.seed = seed
        self.root = with_home(data.root)

    def training_contexts(self, most: int) -> list[tuple[Context, int]]:
        """Of a source that is answered: lengths of training prompts, at most `most`, and how many of each."""
        return [(Context(name=f"{most}", tokens=most), NO_LIMIT)]

    @property
    def on_hub(self) -> bool:
        """Whether it is read from the hub rather than from local files."""
        path = getattr(self.source, "path", None)
        return path is not None and not looks_local(path, self.root)

    @abstractmethod
    def shards(self) -> list[Shard]:
        """Its units of reading, for the splits of `use`, without reading rows.

        Raises:
            BadData: if a file or a hub data set is missing; the text says where to get and to put it.
        """

    @abstractmethod
    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        """The documents and bad rows of one shard, in order."""

    @abstractmethod
    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        """Prompts of one split and context; documents that give none are counted in `request.skipped`."""

    @property
    def per_document(self) -> int:
        """The most prompts of one context that a document gives."""
        return self.data.prompts_per_document

    @property
    def training_share(self) -> float:
        """The share of the text of its training shards that falls to the training split."""
        return 1.0

    def estimate_sequences(self, bytes_per_token: float) -> float:
        """Training sequences by the sizes of local files, were a token so many bytes of text.

        What is left at the end of a document makes no sequence; where documents end is known of whole files.
        """
        return 0.0 if self.answered else self.estimate_texts(bytes_per_token, self.data.sequence_tokens)

    def estimate_texts(self, bytes_per_token: float, tokens: int) -> float:
        """Pieces of so many tokens in the training documents, by the sizes of local files."""
        shards = [shard for shard in self.shards() if shard.split in (None, "train")]
        total = 0.0
        for file in {Path(table.path) for shard in shards for table in shard.tables}:
            text = file.stat().st_size * (EXPANSION if file.suffix in COMPRESSED else 1)
            found = text / bytes_per_token / tokens
            total += self.training_share * (math.floor(found) if self.whole_files else found)
        return total

    def num_prompts(self, tokens: int, context: Context) -> int:
        """Prompts that a document of so many tokens gives at a context."""
        return min(self.per_document, tokens // context.tokens)

    def estimate_prompts(self, bytes_per_token: float) -> dict[str, int]:
        """Test prompts by context; local documents are read until there are enough."""
        wanted, counts = self.data.prompts, {context.name: 0 for context in self.data.contexts}
        shards = [shard for shard in self.shards() if shard.split in (None, "test")]
        rows = (row for shard in shards for row in self.documents(shard))
        documents = (row for row in rows if not isinstance(row, BadRow) and row.split == "test")
        for document in distinct(documents, Counter()):
            text = document.before + document.text + document.after
            tokens = int(len(text.encode()) / bytes_per_token)
            for context in self.data.contexts:
                found = self.num_prompts(tokens, context)
                counts[context.name] = min(wanted, counts[context.name] + found)
            if min(counts.values()) == wanted:
                break
        return counts

    def origin(self) -> dict[str, str]:
        """Facts for the manifest beyond the file list, such as whose wording a template is."""
        return {}

    def extra_files(self) -> list[Path]:
        """Local files beside the shards' that the result depends on."""
        return []

    def version(self, files: Iterable[Path]) -> int:
        """Raised when these files are read into other documents or prompts than before."""
        return 1


def distinct(documents: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
    """Without copies, and each text under one id: several questions about one text are about one document.

    What is counted by document (intervals, controls, prompts a document) goes by the id.
    """
    seen: set[str] = set()
    ids: dict[str, str] = {}
    for document in documents:
        chat = json.dumps([document.messages, document.tools])
        key = digest("\0".join((document.before, document.text, document.after, chat)))
        if key in seen:
            skipped["copy of an earlier document"] += 1
        else:
            seen.add(key)
            first = ids.setdefault(digest(document.text), document.document_id)
            yield document.model_copy(update={"document_id": first})


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_shard(folder: Path, item: tuple[Reader[Any], Shard]) -> ShardSummary:
    """Read one shard into part files below `folder`; a shard that has its summary is not read again."""
    reader, shard = item
    summary_file = folder / f"{shard.key}.summary.json"
    if summary_file.exists():
        return ShardSummary.model_validate_json(summary_file.read_text(encoding="utf-8"))
    waiting: dict[Split, list[Document]] = {}
    parts: list[Part] = []
    bad: Counter[str] = Counter()
    offenders: list[str] = []
    num_rows = 0

    def flush(split: Split) -> None:
        documents = waiting.pop(split)
        number = sum(part.split == split for part in parts)
        name = f"{shard.source}-{split}-{shard.index:05d}-{number:03d}.jsonl"
        write_rows(folder / name, documents)
        notes = [DocumentNote(document_id=d.document_id, digest=digest(d.text)) for d in documents]
        parts.append(Part(file=name, source=shard.source, split=split, documents=notes))

    for row in reader.documents(shard):
        num_rows += 1
        if isinstance(row, BadRow):
            bad[row.reason] += 1
            if bad[row.reason] <= OFFENDERS:
                offenders.append(f"{row.where}: {row.reason}" + (f" ({row.detail})" if row.detail else ""))
            continue
        waiting.setdefault(row.split, []).append(row)
        if len(waiting[row.split]) == reader.data.documents_per_shard:
            flush(row.split)
    for split in sorted(waiting):
        flush(split)
    summary = ShardSummary(
        source=shard.source,
        parts=parts,
        num_rows=num_rows,
        bad=dict(sorted(bad.items())),
        offenders=offenders,
    )
    write_text(summary_file, summary.model_dump_json(indent=1) + "\n")
    return summary


def bad_row_counts(summaries: list[ShardSummary], max_bad_fraction: float) -> dict[str, dict[str, object]]:
    """Rows, bad rows by reason and first offenders, by source.

    Raises:
        BadData: if the share of bad rows of any source is above `max_bad_fraction`; lists the offenders.
    """
    counts: dict[str, dict[str, object]] = {}
    problems = []
    for source in dict.fromkeys(s.source for s in summaries):
        own = [s for s in summaries if s.source == source]
        num_rows = sum(s.num_rows for s in own)
        bad: Counter[str] = Counter()
        for summary in own:
            bad.update(summary.bad)
        offenders = [line for s in own for line in s.offenders][: 2 * OFFENDERS]
        counts[source] = {"rows": num_rows, "bad": dict(sorted(bad.items())), "offenders": offenders}
        if bad.total() > max_bad_fraction * num_rows:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(bad.items()))
            problems.append(
                f"source {source!r}: {bad.total()} of {num_rows} rows are bad ({reasons}), more than "
                f"data.max_bad_fraction ({max_bad_fraction:g}) allows:\n  " + "\n  ".join(offenders)
            )
    if problems:
        raise BadData("\n".join(problems) + "\nRepair or remove these rows, or raise data.max_bad_fraction")
    return counts


def read_parts(folder: Path, parts: Iterable[Part], dropped: Dropped | None = None) -> Iterator[Document]:
    """The documents of some parts, one part in memory at a time, without the dropped ones."""
    for part in parts:
        leave_out = (dropped or {}).get(part.file, frozenset())
        for document in read_rows(folder / part.file, Document):
            if document.document_id not in leave_out:
                yield document


def find_copies(parts: Iterable[Part], answered: Set[str] = frozenset()) -> dict[str, set[str]]:
    """Documents to drop, by file, because an earlier one has the same text.

    Args:
        answered: sources whose texts are asked about; one may be there to be continued as well.
    """
    seen: set[tuple[bool, str]] = set()
    copies: dict[str, set[str]] = {}
    for part in parts:
        for note in part.documents:
            key = (part.source in answered, note.digest)
            if key in seen:
                copies.setdefault(part.file, set()).add(note.document_id)
            seen.add(key)
    return copies
