"""LWM's tasks: a book's summary, or needles (one or several) hidden in book text.

The books are NarrativeQA's or PG-19's rows. The rows of `prompt_split` become test prompts; the other splits
of `use` are read whole. A training text that is also a prompt is dropped by decontamination, as any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, StrictStr, model_validator

from pipeline.config.data import LwmSource, Split
from pipeline.data.chat import in_chat
from pipeline.data.documents import MIN_CHARS, Document, Reader, Request, Shard
from pipeline.data.prompts import needle_prompts, question, split_template, template_prompts
from pipeline.data.reading import (
    BadRow,
    Table,
    checked,
    hub_tables,
    local_path,
    split_files,
    table_rows,
    text_problem,
)
from pipeline.errors import BadData
from pipeline.store.rows import Prompt

if TYPE_CHECKING:
    from datasets import Features

WHAT = "book text in NarrativeQA's (hub id deepmind/narrativeqa) or PG-19's schema (hub id emozilla/pg19)"
PAPER_ROWS = (
    0, 50, 300, 800, 950, 1100, 2150, 2450, 2550, 2750,
    3350, 3400, 3600, 3900, 4000, 4100, 4200, 4400, 4500, 4550,
)  # fmt: skip
# What LWM's prompts have of a chat; a chat template has its own.
SYSTEM_AND_USER, ASSISTANT = "You are a helpful assistant. USER: ", "ASSISTANT: "
SUMMARY = (
    f"{SYSTEM_AND_USER}Please read a part of the book below, and then give me the summary.\n"
    "[start of the book]\n{book}\n[end of the book]\n\n"
    "Now you have read it. Please summarize it for me.\n\n" + ASSISTANT
)
NEEDLE = "\nThe special magic {city} number is: {number}\n"
RETRIEVAL = (
    SYSTEM_AND_USER + "{context} {question} Don't give information outside the document or "
    "repeat your findings. Keep your response short and direct. " + ASSISTANT
)


class Story(BaseModel):
    id: StrictStr
    text: StrictStr


class BookRow(BaseModel):
    """The fields that are needed of a row: NarrativeQA's nested document, or PG-19's text."""

    document: Story | None = None
    text: StrictStr | None = None

    @model_validator(mode="after")
    def _has_text(self) -> BookRow:
        if self.document is None and self.text is None:
            raise ValueError("neither document.text (NarrativeQA) nor text (PG-19) is there")
        return self


def features(table: Table) -> Features:
    """The hub's schema of the column that is read: NarrativeQA's `document`, or PG-19's `text`."""
    from datasets import Features, Value

    if table.hub_split is not None:
        nested = "narrativeqa" in table.path.lower()
    elif table.path.endswith(".parquet"):
        from pyarrow import ArrowException
        from pyarrow.parquet import read_schema

        try:
            nested = "document" in read_schema(table.path).names
        except (ArrowException, OSError) as error:
            raise BadData(f"{table.path} cannot be read as parquet: {error}") from error
    else:
        nested = True
    if not nested:
        return Features({"text": Value("string")})
    text = Value("string")
    summary = {"text": text, "tokens": [text], "url": text, "title": text}
    document = {name: text for name in ("id", "kind", "url", "start", "end", "text")}
    sizes = {"file_size": Value("int32"), "word_count": Value("int32")}
    return Features({"document": {**document, **sizes, "summary": summary}})


def without_speakers(document: Document) -> Document:
    before, after = document.before.removeprefix(SYSTEM_AND_USER), document.after.removesuffix(ASSISTANT)
    return document.model_copy(update={"before": before, "after": after.rstrip()})


class LwmReader(Reader[LwmSource]):
    @property
    def summarizes(self) -> bool:
        return self.source.task == "summary"

    @property
    def per_document(self) -> int:
        return 1 if self.summarizes else super().per_document

    @property
    def prompt_split(self) -> Split:
        return self.source.prompt_split or ("train" if self.summarizes else "test")

    def shards(self) -> list[Shard]:
        self._template()  # a wrong template stops the run before any work
        found = []
        for split in self.source.use:
            if split == "test":
                rows = PAPER_ROWS if self.source.rows is None and self.summarizes else self.source.rows
                tables = tuple(self._tables(self.prompt_split))
                found.append(Shard(self.source.name, "test", 0, tables, rows or None))
            else:
                found += [
                    Shard(self.source.name, split, k, (table,)) for k, table in enumerate(self._tables(split))
                ]
        return found

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        """NarrativeQA repeats a story for each of its questions: the first copy counts."""
        assert shard.split is not None
        before, after = self._template()
        wanted = set(shard.rows) if shard.rows is not None else None
        last = max(wanted) if wanted else math.inf
        seen: set[str] = set()
        number = -1
        rows = (row for table in shard.tables for row in table_rows(table, features(table), WHAT))
        for number, raw in enumerate(rows):
            if number > last:
                break
            if wanted is not None and number not in wanted:
                continue
            row = raw if isinstance(raw, BadRow) else checked(raw, BookRow)
            if isinstance(row, BadRow):
                yield row
                continue
            text = row.document.text if row.document is not None else row.text or ""
            name = row.document.id if row.document is not None else f"{shard.split}/{shard.index}-{number}"
            if name in seen:
                continue
            seen.add(name)
            if problem := text_problem(text, MIN_CHARS):
                yield BadRow(raw.where, raw.index, *problem)
            else:
                yield Document(
                    document_id=f"{self.source.name}/{name}",
                    source=self.source.name,
                    split=shard.split,
                    text=text,
                    before=before if self.summarizes else "",
                    after=after if self.summarizes else "",
                )
        missing = sorted(row for row in wanted or () if row > number)
        if missing:
            default = "" if self.source.rows is not None else " (the paper's rows, the default)"
            raise BadData(
                f"source {self.source.name!r}: the split {self.prompt_split!r} of {self.source.path} has "
                f"{number + 1} rows, so rows {missing}{default} are not there: set the source's `rows`, "
                "or rows: [] for all of them"
            )

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        chat = in_chat(request.tokenizer, self.source.chat_template, self.source.name)
        if self.summarizes:
            asked = (without_speakers(document) for document in documents) if chat else documents
            return template_prompts(asked, request, "text end", chat)
        count = 1 if self.source.task == "needle" else self.source.needles
        template = self.source.template or RETRIEVAL
        if chat:
            template = template.removeprefix(SYSTEM_AND_USER).removesuffix(ASSISTANT).rstrip()
        return needle_prompts(documents, request, template, NEEDLE, count, chat)

    def version(self, files: Iterable[Path]) -> int:
        """A target's own tokenizer may have a chat template."""
        return 2 if self.data.tokenizer.kind == "target" else 1

    def origin(self) -> dict[str, str]:
        rows = "listed" if self.source.rows else "all"
        if self.source.rows is None and self.summarizes:
            rows = "the paper's 20"
        return {"prompt_split": self.prompt_split, "prompt_rows": rows}

    def _template(self) -> tuple[str, str]:
        name = f"source {self.source.name!r}"
        if self.summarizes:
            return split_template(self.source.template or SUMMARY, "book", {}, name)
        example = {"question": question(["Oslo"])}
        return split_template(self.source.template or RETRIEVAL, "context", example, name)

    def _tables(self, split: Split) -> list[Table]:
        if self.on_hub:
            hub = Table(self.source.path, hub_split=split)
            return hub_tables(self.source.path, split, features(hub), WHAT)
        path = local_path(self.source.path, self.root)
        if path.is_file():
            if self.source.use != ("test",):
                raise BadData(
                    f"source {self.source.name!r}: {path} is one file, which can only feed use: [test]; give "
                    "a folder with train/validation/test files for more splits"
                )
            return [Table(str(path))]
        return [Table(str(file)) for file in split_files(path, split, WHAT)]
