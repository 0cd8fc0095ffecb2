"""What prepared data is known by: the same where nothing is read otherwise than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import Config
from pipeline.data.prepare import local_files, stage_inputs
from pipeline.data.sources.registry import make_readers
from pipeline.store.files import fingerprint
from tests.helpers.documents import bench, book, narrative, story, write_lines
from tests.helpers.tiny import tiny_config

TEXT = {"kind": "text", "name": "text", "files": ["*.txt"]}
PG19 = {"kind": "pg19", "name": "pg19", "path": "./books"}
LWM = {"kind": "lwm", "name": "lwm", "path": "nqa", "rows": []}
BENCH = {"kind": "longbench", "name": "bench", "task": "qmsum", "path": "bench"}
OWN = {"kind": "prompts", "name": "own", "files": ["own.md"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "validation", "test"):
        write_lines(tmp_path / "books" / f"{split}.jsonl", [book(1)])
        write_lines(tmp_path / "nqa" / f"{split}.jsonl", [narrative(1, "a")])
    write_lines(tmp_path / "bench" / "qmsum.jsonl", [bench(1, "Who?")])
    for name in ("a.txt", "own.md", "rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text(story(1))
    return tmp_path


def config_of(root: Path, *sources: dict[str, Any], **groups: Any) -> Config:
    return tiny_config({"data.root": str(root), "data.sources": list(sources), **groups})


def inputs_of(config: Config) -> dict[str, Any]:
    readers = make_readers(config.data, config.seed)
    shards = [shard for reader in readers.values() for shard in reader.shards()]
    return stage_inputs(config, readers, local_files(readers, shards))


def test_texts_and_books_under_a_new_tokenizer_are_known_as_ever(root: Path):
    """By settings and files alone, which is what prepared data was known by at first."""
    config = config_of(root, TEXT, PG19, LWM)
    books = [root / "books" / f"{split}.jsonl" for split in ("train", "validation", "test")]
    files = [root / "a.txt", *books, root / "nqa" / "train.jsonl"]
    stats = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    settings = config.data.model_dump(mode="json", exclude={"root", "prepared"})
    assert inputs_of(config) == {"data": settings, "seed": config.seed, "files": fingerprint(stats)}


@pytest.mark.parametrize(
    ("source", "known"),
    [
        (BENCH, {"bench": 2}),
        (OWN, {"own": 2}),
        ({**TEXT, "files": ["a.txt", "rows.jsonl"]}, {"text": 2}),
        ({**TEXT, "files": ["*.*"]}, {"text": 2}),
    ],
    ids=["questions", "prompts", "rows", "tables"],
)
def test_what_is_read_otherwise_than_before_is_prepared_anew(root: Path, source: Any, known: dict[str, int]):
    inputs = inputs_of(config_of(root, PG19, source))
    assert inputs["readers"] == known and set(inputs) == {"data", "seed", "files", "readers"}


def test_prompts_of_pretrained_tokenizers_are_made_anew(root: Path):
    target = {"kind": "pretrained", "path": "owner/name"}
    inputs = inputs_of(config_of(root, PG19, target=target, **{"data.tokenizer": {"kind": "target"}}))
    assert inputs["tokenizer"]["version"] == 2 and "readers" not in inputs
