"""PG-19: whole books, with the splits that the data set comes with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, StrictStr

from pipeline.config.data import Pg19Source
from pipeline.data.documents import MIN_CHARS, Document, Reader, Request, Shard
from pipeline.data.prompts import continuation_prompts
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
from pipeline.store.rows import Prompt

if TYPE_CHECKING:
    from datasets import Features

WHAT = "PG-19's files (short_book_title, publication_date, url, text; hub id emozilla/pg19)"


class Book(BaseModel):
    """The fields that are needed of a row."""

    text: StrictStr


def features() -> Features:
    """The hub's schema, of the one column that is read."""
    from datasets import Features, Value

    return Features({"text": Value("string")})


class Pg19Reader(Reader[Pg19Source]):
    continues_text = True

    def shards(self) -> list[Shard]:
        found = []
        for split in self.source.use:
            if self.on_hub:
                tables = hub_tables(self.source.path, split, features(), WHAT)
            else:
                files = split_files(local_path(self.source.path, self.root), split, WHAT)
                tables = [Table(str(file)) for file in files]
            found += [Shard(self.source.name, split, k, (table,)) for k, table in enumerate(tables)]
        return found

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        assert shard.split is not None
        for raw in table_rows(shard.tables[0], features(), WHAT):
            book = raw if isinstance(raw, BadRow) else checked(raw, Book)
            if isinstance(book, BadRow):
                yield book
            elif problem := text_problem(book.text, MIN_CHARS):
                yield BadRow(raw.where, raw.index, *problem)
            else:
                yield Document(
                    document_id=f"{self.source.name}/{shard.split}/{shard.index}-{raw.index}",
                    source=self.source.name,
                    split=shard.split,
                    text=book.text,
                )

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        return continuation_prompts(documents, request)
