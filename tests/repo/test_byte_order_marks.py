"""A UTF-8 byte order mark, which editors put before a text, is no part of it in any file that users write."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from jobs.cli.use import _read_prompt
from jobs.commands.doctor import _deepspeed
from jobs.executors.ray_train import read_settings
from pipeline.config.files import dump_config, load_config
from pipeline.data.reading import BadRow, RawRow, Table, table_rows
from pipeline.data.sources.chats import list_rows
from pipeline.data.sources.longbench import published
from pipeline.data.sources.text import read_text
from pipeline.models.convert import PICKLED, pickled_files
from pipeline.models.load import ModelRef
from pipeline.models.weights import INDEX, weight_files
from tests.helpers.tiny import tiny_config


def from_stdin(file: Path) -> str:
    with pytest.MonkeyPatch.context() as patch, file.open("rb") as opened:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(opened.read())))
        return _read_prompt(None)


def index_of_safetensors(file: Path) -> list[str]:
    (file.parent / "a.safetensors").touch()
    return [found.name for found in weight_files(ModelRef(str(file.parent)), file.parent)]


def index_of_bins(file: Path) -> list[str]:
    (file.parent / "a.bin").touch()
    return [found.name for found in pickled_files(file.parent)]


def settings(file: Path) -> str:
    config = tiny_config({"run.executor": "ray", "train.deepspeed": str(file)})
    return _deepspeed(config).status


def values(rows: Iterable[RawRow | BadRow]) -> list[object]:
    return [row.values if isinstance(row, RawRow) else row for row in rows]


def template(file: Path) -> str | None:
    return published(file.name, "trec", str, file.parent)


ROW = {"a": 1}
# The file's name, what it holds, what reads it, and what comes of it.
READERS: dict[str, tuple[str, str, Callable[[Path], object], object]] = {
    "config": ("my.yaml", dump_config(tiny_config()), load_config, tiny_config()),
    "DeepSpeed": ("zero.json", "{}", lambda file: read_settings(str(file)), {}),
    "DeepSpeed, doctor": ("zero.json", "{}", settings, "ok"),
    "JSON lines": ("a.jsonl", '{"a": 1}', lambda file: values(table_rows(Table(str(file)), None, "")), [ROW]),
    "JSON list": ("a.json", '[{"a": 1}]', lambda file: values(list_rows(file)), [ROW]),
    "LongBench": ("p.json", '{"trec": "x"}', template, "x"),
    "index": (INDEX, '{"weight_map": {"w": "a.safetensors"}}', index_of_safetensors, ["a.safetensors"]),
    "index of .bin": (PICKLED[1], '{"weight_map": {"w": "a.bin"}}', index_of_bins, ["a.bin"]),
    "prompt": ("prompt.txt", "Once\n", _read_prompt, "Once\n"),
    "standard input": ("prompt.txt", "Once\n", from_stdin, "Once\n"),
    "text": ("a.txt", "Once\r\n", lambda file: read_text(file, 0), "Once\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("reader", READERS)
def test_marks_are_left_out(tmp_path: Path, reader: str, encoding: str) -> None:
    name, text, call, expected = READERS[reader]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert call(tmp_path / name) == expected


def test_configs_with_marks_extend_each_other(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(dump_config(tiny_config()), encoding="utf-8-sig")
    (tmp_path / "over.yaml").write_text("extends: base.yaml\nname: over\n", encoding="utf-8-sig")
    assert load_config(tmp_path / "over.yaml") == tiny_config({"name": "over"})
