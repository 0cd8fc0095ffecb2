"""Any text files; "stdlib" is the source code of the running Python's standard library.

A file is one document; of JSON lines and parquet each row is one, by its field `text`.

Splits are drawn by document: a hash of the content and the seed places each document on [0, 1), so that a
document keeps its split whatever else is in the set, and copies share one.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, StrictStr

from pipeline.config.data import Context, Data, TextSource, answered
from pipeline.data.chat import in_chat
from pipeline.data.documents import BYTE_ORDER_MARK, MIN_CHARS, NO_LIMIT, Document, Request, Shard
from pipeline.data.prompts import asking_prompts, continuation_prompts, split_template
from pipeline.data.reading import (
    STRUCTURED,
    SUFFIXES,
    BadRow,
    Table,
    checked,
    local_path,
    must_be_file,
    table_rows,
    text_problem,
)
from pipeline.data.sources.drawn import DrawnReader
from pipeline.errors import BadData
from pipeline.store.rows import Prompt

if TYPE_CHECKING:
    from datasets import Features

STDLIB = "stdlib"
WHAT = "documents with a field `text`"
# Test suites hold files that are broken on purpose, site-packages is not the library, and encodings are
# generated tables so alike that each held-out one would empty the training split of the others.
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}


class TextRow(BaseModel):
    """The field that is needed of a row."""

    text: StrictStr


def text_column() -> Features:
    from datasets import Features, Value

    return Features({"text": Value("string")})


class TextReader(DrawnReader[TextSource]):
    whole_files = True

    def __init__(self, source: TextSource, data: Data, seed: int) -> None:
        super().__init__(source, data, seed)
        self.answered = answered(source)
        self.continues_text = not self.answered

    def shards(self) -> list[Shard]:
        self._sides()  # a wrong template stops the run before any work
        files = sorted({file for pattern in self.source.files for file in expand(pattern, self.root)})
        # Hashed order: a shard, and so any first few documents, mixes files of all folders.
        files.sort(key=lambda file: hashlib.sha256(f"{self.seed}/{self._name(file)}".encode()).digest())
        per_shard = self.data.documents_per_shard
        return [
            Shard(self.source.name, None, k, tuple(Table(str(f)) for f in files[i : i + per_shard]))
            for k, i in enumerate(range(0, len(files), per_shard))
        ]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        for index, table in enumerate(shard.tables):
            if table.path.endswith(SUFFIXES):
                for raw in table_rows(table, text_column(), WHAT):
                    row = raw if isinstance(raw, BadRow) else checked(raw, TextRow)
                    yield row if isinstance(row, BadRow) else self._document(raw.where, raw.index, row.text)
            else:
                text = read_text(Path(table.path), index)
                yield text if isinstance(text, BadRow) else self._document(table.path, index, text)

    def _document(self, where: str, index: int, text: str) -> Document | BadRow:
        text = text.lstrip(BYTE_ORDER_MARK)  # before the split is drawn: copies share one
        if problem := text_problem(text, MIN_CHARS):
            return BadRow(where, index, *problem)
        name = f"{self.source.name}/{self._name(Path(where))}"
        before, after = self._sides()
        return Document(
            document_id=name,
            source=self.source.name,
            split=self.split(text),
            text=text,
            before=before,
            after=after,
        )

    def _sides(self) -> tuple[str, str]:
        """What is asked, before and after the text."""
        if self.source.ask is None:
            return "", ""
        return split_template(self.source.ask, "text", {}, f"source {self.source.name!r}")

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        if self.source.ask is None:
            return continuation_prompts(documents, request)
        chat = in_chat(request.tokenizer, self.source.chat_template, self.source.name)
        return asking_prompts(documents, request, chat)

    def training_contexts(self, most: int) -> list[tuple[Context, int]]:
        counts = self.source.training_prompts or {most: NO_LIMIT}
        return [(Context(name=f"{tokens}", tokens=tokens), count) for tokens, count in counts.items()]

    def version(self, files: Iterable[Path]) -> int:
        """Files that hold fields were texts with all their braces once."""
        return 2 if any(file.suffix.lower() in STRUCTURED for file in files) else 1

    def _name(self, file: Path) -> str:
        """The file's name in document ids: short, and the same on every machine where it can be."""
        for base, prefix in ((stdlib_folder(), f"{STDLIB}/"), (self.root.absolute(), "")):
            if file.is_relative_to(base):
                return prefix + file.relative_to(base).as_posix()
        return file.as_posix()


@cache
def stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def expand(pattern: str, root: Path) -> list[Path]:
    """The files of one path, glob or "stdlib".

    Raises:
        BadData: if nothing matches, or a path that is there or no glob is missing or a directory.
    """
    if pattern == STDLIB:
        base = stdlib_folder()
        found = [
            file
            for file in base.rglob("*.py")
            # Empty __init__.py files are as they should be, so they are left out rather than counted as bad.
            if not NOT_LIBRARY & set(file.relative_to(base).parts) and file.stat().st_size > MIN_CHARS
        ]
        if not found:
            raise BadData(f"{base} holds no .py files: this Python has no library sources; name other files")
        return found
    path = local_path(pattern, root)
    if path.exists() or not glob.has_magic(pattern):
        must_be_file(path, "the text file that the config names")
        return [path]
    # A directory that a bare * or ** matches is not meant; one called like a text file is a mistake to count.
    any_name = path.name.strip("*") == ""
    matches = [Path(match) for match in glob.glob(as_glob(path), recursive=True)]
    files = [match for match in matches if not (any_name and match.is_dir())]
    if not files:
        raise BadData(f"no file matches {path}: check the glob, or data.root ({root.absolute()})")
    return files


def as_glob(path: Path) -> str:
    """A whole path as a glob; folders that exist stand for themselves, whatever signs are in their names."""
    known, rest = Path(path.anchor), list(path.parts[1:])
    while rest and (known / rest[0]).is_dir():
        known /= rest.pop(0)
    return str(Path(glob.escape(str(known)), *rest))


def read_text(file: Path, index: int) -> str | BadRow:
    """The file as UTF-8 without a byte order mark, line ends untouched, or why not."""
    if file.is_dir():
        return BadRow(str(file), index, "a directory")
    if file.suffix.lower() in STRUCTURED:
        return BadRow(str(file), index, "no plain text", f"files of {file.suffix} hold fields, or are packed")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return BadRow(str(file), index, "bad UTF-8", str(error))
    except OSError as error:
        return BadRow(str(file), index, "unreadable", str(error))
