"""Good and bad rows of every format."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipeline.data.reading import (
    BadRow,
    Table,
    hub_tables,
    local_path,
    looks_local,
    must_be_file,
    split_files,
    table_rows,
)
from pipeline.data.sources.pg19 import features
from pipeline.errors import BadData
from tests.helpers.documents import book, write_lines


def rows_of(path: Path):
    return list(table_rows(Table(str(path)), features(), "books"))


def test_bad_lines_are_named_and_the_others_survive(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [{"text": "a"}, "{broken", "[1]", "", {"text": "b"}])
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    rows = rows_of(path)
    assert [r.reason if isinstance(r, BadRow) else r.values["text"] for r in rows] == [
        "a", "not JSON", "not an object", "b", "bad UTF-8",
    ]  # fmt: skip
    assert rows[1].where == f"{path}:2" and rows[4].where == f"{path}:6"
    assert [r.index for r in rows] == [0, 1, 2, 3, 4]


def test_a_torn_gzip_keeps_the_whole_lines_before_the_tear(tmp_path):
    lines = [json.dumps({"text": "x" * 50, "n": k}) + "\n" for k in range(3000)]
    data = b"".join(gzip.compress("".join(lines[i : i + 100]).encode()) for i in range(0, 3000, 100))
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    rows = rows_of(path)
    assert isinstance(rows[-1], BadRow) and rows[-1].reason == "torn file"
    good = [r.values["n"] for r in rows[:-1]]
    assert good == list(range(len(good))) and len(good) > 1000


def test_parquet_gives_the_rows_that_json_gives(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    books = [book(1), book(2)]
    pq.write_table(pa.Table.from_pylist(books), tmp_path / "test.parquet")
    got = [r.values["text"] for r in rows_of(tmp_path / "test.parquet")]
    assert got == [b["text"] for b in books]


def test_a_parquet_file_of_another_schema_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [[1], [2]]}), tmp_path / "test.parquet")
    with pytest.raises(BadData, match=r"test\.parquet row|test\.parquet cannot"):
        rows_of(tmp_path / "test.parquet")


def test_split_files_finds_shards_and_names_what_is_missing(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        write_lines(tmp_path / "data" / name, [{"text": "a"}])
    assert [f.name[:11] for f in split_files(tmp_path, "train", "books")] == ["train-00000", "train-00001"]
    with pytest.raises(BadData, match=r"has no test\.jsonl .* put books there"):
        split_files(tmp_path, "test", "books")
    with pytest.raises(BadData, match="nowhere does not exist: put books there"):
        split_files(tmp_path / "nowhere", "test", "books")
    (tmp_path / "validation.jsonl").mkdir()
    with pytest.raises(BadData, match="is a directory where a file is needed"):
        split_files(tmp_path, "validation", "books")


def test_local_paths_and_hub_ids_are_told_apart(tmp_path):
    (tmp_path / "here").mkdir()
    assert not looks_local("emozilla/pg19", tmp_path)
    for path in ("here", "here/pg19", "./a/b", "~/a", "/a/b", "a/b/c", "books"):
        assert looks_local(path, tmp_path), path


def test_without_the_hub_the_error_says_what_and_where(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'emozilla/pg19' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(BadData, match=r"emozilla/pg19.*Missing: PG-19.*HF_HUB_OFFLINE.*`path`"):
        hub_tables("emozilla/pg19", "train", features(), "PG-19")


def test_hub_shards_together_give_every_row_once(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    for k in range(3):
        pq.write_table(pa.Table.from_pylist([book(2 * k), book(2 * k + 1)]), tmp_path / f"{k}.parquet")
    load = datasets.load_dataset

    def hub(path, split, **kwargs):
        assert (path, split) == ("emozilla/pg19", "train")
        return load("parquet", data_files=str(tmp_path / "*.parquet"), split="train", **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    tables = hub_tables("emozilla/pg19", "train", features(), "PG-19")
    texts = [row.values["text"] for table in tables for row in table_rows(table, features(), "PG-19")]
    assert len(tables) == 3 and sorted(texts) == sorted(book(k)["text"] for k in range(6))


def test_a_home_that_nobody_has_is_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert looks_local("~nobody-here/books", tmp_path)
    with pytest.raises(BadData, match="nobody-here"):
        must_be_file(local_path("~nobody-here/books.txt", tmp_path), "books")
