"""Files that are written whole or not at all, fingerprints, and typed rows as JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from pipeline.errors import BadData

RowT = TypeVar("RowT", bound=BaseModel)


def fingerprint(value: Any) -> str:
    """12 hex digits of a JSON-able value or pydantic model, independent of key order."""

    def plain(item: Any) -> Any:
        if isinstance(item, BaseModel):
            return item.model_dump(mode="json")
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"cannot fingerprint a {type(item).__name__}")

    text = json.dumps(value, sort_keys=True, default=plain, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: containers that share a storage have the same ones.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """One `.npy` file, to be read back as a memory map."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def write_rows(path: Path, rows: Iterable[BaseModel]) -> None:
    """Typed rows as JSON lines."""
    write_text(path, "".join(row.model_dump_json() + "\n" for row in rows))


def read_rows(path: Path, row_type: type[RowT]) -> list[RowT]:
    """The rows of one file.

    Raises:
        BadData: if a line is not such a row; the text names file and line.
    """
    rows: list[RowT] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = row_type.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                field = "".join(f" {part}" for part in first["loc"])
                raise BadData(
                    f"{path}, line {number}: no {row_type.__name__} of this version,{field} {first['msg']}: "
                    "delete its folder and run its stage again"
                ) from None
            # Pydantic keeps in each row the set of the fields it was given, most of a row's memory. In one
            # file these sets are nearly always equal, and rows share one.
            if rows and row.model_fields_set == rows[-1].model_fields_set:
                object.__setattr__(row, "__pydantic_fields_set__", rows[-1].model_fields_set)
            rows.append(row)
    return rows


def read_all(folder: Path, row_type: type[RowT]) -> list[RowT]:
    """The rows of all files of a folder."""
    return [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file, row_type)]
