"""Raw rows from local files and the hub, one at a time, with every bad row named.

JSON lines are read by a strict reader of our own: `datasets` parses JSON in blocks, so that one bad line
would lose its whole block and could not be named. Parquet and the hub go through `datasets` streaming with
explicit `Features`, because inference from the first rows breaks on columns that start with nulls.
A path is looked for on disk before the hub is asked: offline, a missing folder and a missing data set would
otherwise end in the same ConnectionError.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import BadData
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from datasets import Features, IterableDataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Files that hold fields or are packed: never one text.
STRUCTURED = {
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".npy", ".npz", ".pkl",
    ".pt", ".safetensors", ".db", ".sqlite", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z", ".pdf",
    ".docx", ".xlsx", ".epub",
}  # fmt: skip
COMPRESSED, EXPANSION = {".gz", ".parquet", ".zip"}, 2.5  # text in files of these kinds, to its size there
RowT = TypeVar("RowT", bound=BaseModel)


@dataclass(frozen=True)
class RawRow:
    """Row `index` (from 0, bad rows included) of its table, before its fields are checked."""

    where: str
    index: int
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: `where` is file:line or the row, `reason` one of a few words."""

    where: str
    index: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A readable unit: a local file, a member of a zip, or one shard of a hub split."""

    path: str
    member: str | None = None
    hub_split: str | None = None
    hub_shard: int = 0
    hub_shards: int = 1


# ── finding ───────────────────────────────────────────────────────────────────────────────────────


def looks_local(path: str, root: Path) -> bool:
    """Whether `path` means a file or folder rather than a hub id such as `emozilla/pg19`."""
    expanded = root / with_home(path)
    first = root.joinpath(*Path(path).parts[:1])  # "." has no parts
    return expanded.exists() or path.startswith((".", "~", "/")) or path.count("/") != 1 or first.exists()


def local_path(path: str, root: Path) -> Path:
    """`path`, relative to the data root unless absolute."""
    return (root / with_home(path)).absolute()


def short_name(place: str | Path, root: Path) -> str:
    """A file, or a file and line, as documents are called: below the data root where it lies there."""
    return str(place).removeprefix(f"{root.absolute()}/")


def split_files(folder: Path, split: str, what: str) -> list[Path]:
    """The files of one split: `<split>.jsonl[.gz]`, `<split>.parquet`, `<split>-*` of the same kinds, also
    below `data/`.

    Raises:
        BadData: if there is none, or one of them is a folder; `what` says what the data set is.
    """
    if not folder.exists():
        raise BadData(f"{folder} does not exist: put {what} there, or give its hub id instead")
    if folder.is_file():
        raise BadData(f"{folder} is a file, and a folder of split files is needed: {what}")
    for place in (folder, folder / "data"):
        found = [
            file
            for suffix in SUFFIXES
            for file in (place / f"{split}{suffix}", *sorted(place.glob(f"{split}-*{suffix}")))
            if file.exists()
        ]
        if found:
            for file in found:
                must_be_file(file, what)
            return found
    names = " or ".join(f"{split}{suffix}" for suffix in SUFFIXES)
    raise BadData(f"{folder} has no {names}: put {what} there, or take {split!r} out of the source's `use`")


def must_be_file(file: Path, what: str) -> None:
    """Raises BadData unless `file` is a file that exists; `what` says what belongs there."""
    if file.is_dir():
        raise BadData(f"{file} is a directory where a file is needed: {what}")
    if not file.exists():
        raise BadData(f"{file} does not exist: put {what} there")


def hub_tables(path: str, split: str, features: Features, what: str) -> list[Table]:
    """The shards of a hub split, one table each. Asks the hub for its file list only."""
    shards = _stream(path, split, features, what).num_shards
    return [Table(path, hub_split=split, hub_shard=k, hub_shards=shards) for k in range(shards)]


def unreachable(path: str, what: str, error: Exception) -> BadData:
    """The error for a data set that is neither on disk nor to be had from the hub."""
    return BadData(
        f"{path!r} is not a local path and cannot be had from the Hugging Face hub "
        f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). Missing: {what}. Either unset "
        f"HF_HUB_OFFLINE and check the network, or fetch it elsewhere from "
        f"https://huggingface.co/datasets/{path}, put it in a folder and set the source's `path` to it"
    )


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def table_rows(table: Table, features: Features | None, what: str) -> Iterator[RawRow | BadRow]:
    """All rows of a table, in order. Of parquet and the hub, the columns of `features` alone are read."""
    if table.hub_split is None and Path(table.path).is_dir():
        yield BadRow(table.path, 0, "a directory")
    elif table.hub_split is not None:
        assert features is not None
        dataset = _stream(table.path, table.hub_split, features, what)
        if table.hub_shards > 1:
            dataset = dataset.shard(num_shards=table.hub_shards, index=table.hub_shard)
        yield from _dataset_rows(dataset, f"{table.path}/{table.hub_split}[{table.hub_shard}]")
    elif table.path.endswith(".parquet"):
        assert features is not None
        yield from _parquet_rows(table.path, features)
    elif table.member is not None:
        with zipfile.ZipFile(table.path) as archive, archive.open(table.member) as file:
            yield from json_lines(file, f"{table.path}:{table.member}")
    else:
        opener = gzip.open if table.path.endswith(".gz") else open
        with opener(table.path, "rb") as file:
            yield from json_lines(file, table.path)


def json_lines(file: IO[bytes] | gzip.GzipFile, name: str) -> Iterator[RawRow | BadRow]:
    """One row per line that is not blank. What follows the tear of a torn gzip is lost, and counts once."""
    index = 0
    number = 0
    lines = iter(file)
    while True:
        number += 1
        where = f"{name}:{number}"
        try:
            line = next(lines, None)
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            yield BadRow(where, index, "torn file", str(error))
            return
        if line is None:
            return
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield BadRow(where, index, "bad UTF-8", str(error))
        except (ValueError, RecursionError) as error:
            yield BadRow(where, index, "not JSON", str(error))
        else:
            if isinstance(values, dict):
                yield RawRow(where, index, values)
            else:
                yield BadRow(where, index, "not an object", f"a {type(values).__name__}")
        index += 1


def checked(raw: RawRow, row_type: type[RowT]) -> RowT | BadRow:
    """`raw` as a typed row, or why not: a missing field or a wrong type, named."""
    try:
        return row_type.model_validate(raw.values)
    except ValidationError as error:
        first = error.errors()[0]
        reason = "missing field" if first["type"] == "missing" else "wrong type"
        words = first["msg"].removeprefix("Value error, ")
        field = ".".join(str(part) for part in first["loc"])
        return BadRow(raw.where, raw.index, reason, f"{field}: {words}" if field else words)


def text_problem(text: str, min_chars: int) -> tuple[str, str] | None:
    """(reason, detail) if `text` cannot be a document."""
    stripped = len(text.strip())
    if stripped == 0:
        return "empty", ""
    if stripped < min_chars:
        return "too short", f"{stripped} characters, fewer than {min_chars}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "bad UTF-8", f"lone surrogate at character {error.start}"
    return None


def _stream(path: str, split: str, features: Features, what: str) -> IterableDataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return load_dataset(path, split=split, streaming=True, features=features, columns=list(features))
    except (
        ConnectionError,
        DatasetNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ) as error:
        raise unreachable(path, what, error) from error


def _parquet_rows(path: str, features: Features) -> Iterator[RawRow]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            "parquet",
            data_files=glob.escape(path),
            split="train",
            streaming=True,
            features=features,
            columns=list(features),
        )
        yield from _dataset_rows(dataset, path)
    except BadData:
        raise
    except Exception as error:  # whatever the libraries raise for what is in the file
        raise BadData(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error


def _dataset_rows(dataset: IterableDataset, name: str) -> Iterator[RawRow]:
    import pyarrow
    from datasets.table import CastError

    try:
        for index, values in enumerate(dataset):
            yield RawRow(f"{name} row {index}", index, values)
    except (pyarrow.ArrowException, CastError, TypeError) as error:  # a cast that cannot be is a TypeError
        raise BadData(f"{name} cannot be read as parquet in the expected schema: {error}") from error
