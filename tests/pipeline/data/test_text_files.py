"""Files of kind text: found by globs and literal names, one text or fields, with or without a mark."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.reading import Table, table_rows
from pipeline.data.sources.text import expand, text_column
from pipeline.errors import BadData
from tests.helpers.documents import story, write_lines
from tests.helpers.sources import read, reader_of


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(story(len(name)))


def found(root: Path, *patterns: str, base: Path | None = None) -> list[str]:
    """Names of the files that patterns stand for, below `base` or else the root."""
    files = {file for pattern in patterns for file in expand(pattern, root)}
    return sorted(file.relative_to(base or root).as_posix() for file in files)


def parquet(file: Path, **columns: list[Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["b [1]", "a*b?", "[ab]", "**", "plain", "[!x]"])
def test_signs_in_names_that_exist_are_letters(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    """In the root, in a folder below it, in an absolute path, in the home folder and in a file's own name."""
    root = tmp_path / name
    touch(root, "x.txt", "y.txt", f"{name}/z.txt", f"{name}.md")
    touch(tmp_path, "a/other.txt", "b/other.txt", "b 1/other.txt", "axbc/other.txt")
    assert found(root, "*.txt") == ["x.txt", "y.txt"]
    assert found(root, f"{name}/*.txt", f"{name}.md") == sorted([f"{name}/z.txt", f"{name}.md"])
    assert found(tmp_path, f"{root}/?.txt", base=root) == ["x.txt", "y.txt"]
    monkeypatch.setenv("HOME", str(root))
    assert found(tmp_path, "~/*.txt", "~/x.txt", base=root) == ["x.txt", "y.txt"]
    assert found(Path("~").expanduser(), "*.txt") == ["x.txt", "y.txt"]


def test_signs_in_names_that_do_not_exist_are_globs(tmp_path: Path):
    touch(tmp_path, "a1.txt", "b1.txt", "c/a1.txt", "c/d/a1.txt")
    assert found(tmp_path, "[ab]1.txt") == ["a1.txt", "b1.txt"]
    assert found(tmp_path, "**/a?.txt") == ["a1.txt", "c/a1.txt", "c/d/a1.txt"]
    assert found(tmp_path, "[a-c]/*/a1.txt") == ["c/d/a1.txt"]
    assert found(tmp_path / "c" / "d", "../*.txt", base=tmp_path / "c" / "d" / "..") == ["a1.txt"]
    for pattern in ("[xy]1.txt", str(tmp_path / "[xy]" / "*.txt"), "c[1]/a1.txt"):
        with pytest.raises(BadData, match=r"no file matches .*check the glob, or data\.root"):
            expand(pattern, tmp_path)
    (tmp_path / "folder [1]").mkdir()
    with pytest.raises(BadData, match=r"folder \[1\] is a directory"):
        expand("folder [1]", tmp_path)


@pytest.mark.parametrize("name", ["b [1]/x.parquet", "c/a*b?.parquet", "d/x[1].parquet", "e/**.parquet"])
def test_tables_are_read_whatever_signs_are_in_their_names(tmp_path: Path, name: str):
    """The library that reads them takes names for globs: it would find nothing, and say nothing."""
    file = parquet(tmp_path / name, text=[story(1), story(2)])
    parquet(tmp_path / "c" / "axbc.parquet", text=[story(3)])
    parquet(tmp_path / "e" / "other.parquet", text=[story(4)])
    rows = list(table_rows(Table(str(file)), text_column(), "texts"))
    assert [row.values["text"] for row in rows] == [story(1), story(2)]


# ── what is in them ───────────────────────────────────────────────────────────────────────────────


def test_rows_of_json_lines_and_parquet_are_documents(tmp_path: Path):
    rows = [{"text": story(k, 3), "id": k} for k in range(4)]
    write_lines(tmp_path / "a.jsonl", [*rows, {"content": story(9)}, "{torn"])
    write_lines(tmp_path / "b.jsonl.gz", [{"text": story(4, 3)}])
    parquet(tmp_path / "c.parquet", text=[story(5, 3), None], content=["x", "y"])
    (tmp_path / "d.txt").write_text(story(6, 3))
    documents, bad = read(reader_of(tmp_path, kind="text", files=["*"], use=["test"]))
    assert {d.document_id: d.text for d in documents} == {
        **{f"s/a.jsonl:{k + 1}": story(k, 3) for k in range(4)},
        "s/b.jsonl.gz:1": story(4, 3), "s/c.parquet row 0": story(5, 3), "s/d.txt": story(6, 3),
    }  # fmt: skip
    assert {b.where.rpartition("/")[2]: b.reason for b in bad} == {
        "a.jsonl:5": "missing field", "a.jsonl:6": "not JSON", "c.parquet row 1": "wrong type",
    }  # fmt: skip


def test_rows_are_split_as_files_of_the_same_text(tmp_path: Path):
    """A mark before a text is none of it."""
    for k in range(40):
        (tmp_path / f"{k:02}.txt").write_text(story(k, 2))
    write_lines(tmp_path / "rows.jsonl", [{"text": "\ufeff" + story(k, 2)} for k in range(40)])
    splits = {}
    for pattern in ("*.txt", "*.jsonl"):
        documents, _ = read(reader_of(tmp_path, kind="text", files=[pattern], test_fraction=0.4))
        splits[pattern] = {d.text: d.split for d in documents}
    assert splits["*.txt"] == splits["*.jsonl"] and len(set(splits["*.txt"].values())) == 3


def test_files_that_hold_fields_or_are_packed_are_no_text(tmp_path: Path):
    names = [
        "a.json",
        "b.csv",
        "c.tsv",
        "d.zip",
        "e.txt.gz",
        "f.ndjson",
        "g.JSONL",
        "h.npy",
        "i.pdf",
        "j.Parquet",
    ]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"text": story(1)}))
    for name in ("k.jsonl", "l.parquet", "m.jsonl.gz"):
        (tmp_path / name).mkdir()
    (tmp_path / "n.rst").write_text(story(1))
    reader = reader_of(tmp_path, kind="text", files=["*.*"], use=["test"])
    documents, bad = read(reader)
    assert [d.document_id for d in documents] == ["s/n.rst"]
    assert {b.where.rpartition("/")[2]: b.reason for b in bad} == {
        **dict.fromkeys(names, "no plain text"),
        **dict.fromkeys(("k.jsonl", "l.parquet", "m.jsonl.gz"), "a directory"),
    }
    assert {b.detail for b in bad if "b.csv" in b.where} == {"files of .csv hold fields, or are packed"}


def test_a_table_without_the_field_is_named(tmp_path: Path):
    parquet(tmp_path / "a.parquet", content=["x"])
    with pytest.raises(BadData, match=r"a\.parquet cannot be read .*text"):
        read(reader_of(tmp_path, kind="text", files=["*.parquet"], use=["test"]))


@pytest.mark.parametrize("packed", [False, True])
def test_a_mark_before_the_first_row_is_no_row(tmp_path: Path, packed: bool):
    lines = "".join(json.dumps({"text": story(k)}) + "\n" for k in range(2)).encode("utf-8-sig")
    file = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    file.write_bytes(gzip.compress(lines) if packed else lines)
    documents, bad = read(reader_of(tmp_path, kind="text", files=[file.name], use=["test"]))
    assert not bad and [d.text for d in documents] == [story(0), story(1)]


def test_marks_at_the_beginning_of_texts_are_left_out_and_others_kept(tmp_path: Path):
    text = "one \ufeff two" + story(1)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")
    parquet(tmp_path / "b.parquet", text=["\ufeff" + text])
    write_lines(tmp_path / "c.jsonl", [{"text": "\ufeff" + text}])
    documents, _ = read(reader_of(tmp_path, kind="text", files=["*"], use=["test"]))
    assert [d.text for d in documents] == [text] * 3
