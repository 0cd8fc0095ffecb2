"""Artifact folders: what damage is found and mended, and that one run at a time works on a folder."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import Timeout

from pipeline.errors import BadData
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.files import read_rows, write_json, write_rows, write_text
from pipeline.store.layout import MANIFEST
from pipeline.store.rows import ModelSize
from tests.helpers.clock import patience, wait_for

FILES = {
    "labels/shard-00000.tokens.npy": "a",
    "labels/shard-00000.argmax.npy": "b",
    "labels/shard-00001.tokens.npy": "c",
    "labels/shard-00001.argmax.npy": "d",
    "prompts/test-64.jsonl": "e",
    "prompts/test-64.jsonl.summary.json": "f",
    "tokenizer/tokenizer.json": "g",
    "tokenizer/config.json": "h",
}


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    made = open_artifact(tmp_path, "teach", {"seed": 1})
    for name, text in FILES.items():
        write_text(made.path / name, text)
    made.finish({"seed": 1}, {"files": len(FILES)}, 1.0)
    return made


def flip(file: Path) -> None:
    """Change one bit of the middle byte; size and name stay."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def left(artifact: Artifact) -> set[str]:
    return {str(f.relative_to(artifact.path)) for f in artifact.path.rglob("*") if f.is_file()}


def test_a_whole_folder_is_not_touched(artifact: Artifact) -> None:
    known = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    assert {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()} == known
    assert artifact.damaged() == []
    with artifact.claim() as unfinished:
        assert not unfinished
    assert left(artifact) == {*FILES, MANIFEST}


@pytest.mark.parametrize(
    ("broken", "gone"),
    [
        # The two files of a shard are made together; the other shard stays.
        ("labels/shard-00001.tokens.npy", {"labels/shard-00001.tokens.npy", "labels/shard-00001.argmax.npy"}),
        ("prompts/test-64.jsonl", {"prompts/test-64.jsonl", "prompts/test-64.jsonl.summary.json"}),
        ("tokenizer/config.json", {"tokenizer/tokenizer.json", "tokenizer/config.json"}),
    ],
)
@pytest.mark.parametrize("how", ["flipped", "shorter", "missing"])
def test_damage_is_named_and_only_what_was_made_with_it_goes(
    artifact: Artifact, broken: str, gone: set[str], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = artifact.path / broken
    if how == "flipped":
        flip(file)
    elif how == "shorter":
        file.write_text("")
    else:
        file.unlink()
    assert artifact.damaged() == [broken]
    with artifact.claim() as unfinished:
        assert unfinished
    assert left(artifact) == FILES.keys() - gone
    assert str(file) in caplog.text


def test_damage_to_one_piece_of_work_takes_all_of_it(artifact: Artifact) -> None:
    flip(artifact.path / "labels/shard-00001.tokens.npy")
    with artifact.claim(whole=True) as unfinished:
        assert unfinished and not artifact.path.exists()


def test_every_changed_byte_of_a_manifest_is_noticed(artifact: Artifact) -> None:
    manifest = artifact.path / MANIFEST
    whole = manifest.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        if chr(whole[place]).isspace():
            continue
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert artifact.damaged(), f"byte {place}: {whole[place - 20 : place + 20]!r}"
    manifest.write_bytes(whole[: len(whole) // 2])
    with artifact.claim() as unfinished:
        assert unfinished
    assert left(artifact) == FILES.keys()  # the rest is kept


@pytest.mark.parametrize("name", ["a\0b", "../" * 20 + "etc/passwd", "/etc/passwd"])
def test_what_a_damaged_manifest_names_elsewhere_is_not_looked_at(artifact: Artifact, name: str) -> None:
    manifest = artifact.path / MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(
        json.dumps(content | {"files": content["files"] | {name: {"bytes": 1, "sha256": ""}}})
    )
    assert artifact.damaged() == [MANIFEST]


def test_files_that_later_runs_write_anew_are_not_checked(tmp_path: Path) -> None:
    made = open_artifact(tmp_path, "report", {})
    write_json(made.path / "summary.json", {"stages": 1})
    write_text(made.path / "cells.jsonl", "")
    made.finish({}, {}, 0.0, leave_out=("summary.json",))
    write_json(made.path / "summary.json", {"stages": 2})
    assert made.damaged() == []


# ── one run at a time ─────────────────────────────────────────────────────────────────────────────


def work(storage: Path, name: str, journal: Path) -> None:
    """Make the artifact, slowly, unless another has."""
    artifact = open_artifact(storage, "teach", {"seed": 2})
    with artifact.claim() as unfinished:
        if unfinished:
            with journal.open("a") as file:
                file.write(f"{name}\n")
            time.sleep(1.0)
            write_text(artifact.path / "rows.jsonl", name)
            artifact.finish({"seed": 2}, {}, 1.0)


def die_with_it(storage: Path) -> None:
    with open_artifact(storage, "teach", {"seed": 2}).claim():
        write_text(storage / "held", "")
        time.sleep(3600)


def start(function: Any, *args: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    return process


def test_of_several_runs_one_does_the_work(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    processes = [start(work, tmp_path, f"run {number}", journal) for number in range(3)]
    for process in processes:
        process.join(patience(60))
        assert process.exitcode == 0
    (worker,) = journal.read_text().splitlines()
    made = open_artifact(tmp_path, "teach", {"seed": 2})
    assert (made.path / "rows.jsonl").read_text() == worker and made.damaged() == []


def test_a_run_that_is_killed_lets_go(tmp_path: Path) -> None:
    process = start(die_with_it, tmp_path)
    wait_for((tmp_path / "held").exists, "the other run held the artifact")
    artifact = open_artifact(tmp_path, "teach", {"seed": 2})
    with pytest.raises(Timeout):
        artifact.lock.acquire(timeout=0)
    assert process.pid is not None
    os.kill(process.pid, 9)
    process.join(patience(10))
    with artifact.claim() as unfinished:
        assert unfinished


# ── a full disk ───────────────────────────────────────────────────────────────────────────────────


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "kept.json", {"old": True})
    with pytest.raises(TypeError):
        write_json(tmp_path / "kept.json", {"new": object()})
    assert json.loads((tmp_path / "kept.json").read_text()) == {"old": True}
    assert [file.name for file in tmp_path.iterdir()] == ["kept.json"]


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    """Cut off, or without a field: the file and the line, in one sentence."""
    file = tmp_path / "sizes.jsonl"
    sizes = [ModelSize(name=name, weight_bytes=1, kv_bytes_per_token=2) for name in "ab"]
    write_rows(file, sizes)
    assert read_rows(file, ModelSize) == sizes
    whole = file.read_text()
    file.write_text(whole[:-9])
    with pytest.raises(BadData, match=r"sizes\.jsonl, line 2: no ModelSize of this version, Invalid JSON"):
        read_rows(file, ModelSize)
    file.write_text(whole.replace("weight_bytes", "weights", 1))
    with pytest.raises(BadData, match=r"line 1: .* weight_bytes Field required: delete its folder"):
        read_rows(file, ModelSize)


def test_what_is_missing_of_a_folder(tmp_path: Path) -> None:
    artifact = open_artifact(tmp_path, "teach", {})
    assert artifact.missing(100) == 100
    (artifact.path / "labels").mkdir(parents=True)
    (artifact.path / "labels" / "one.npy").write_bytes(b"0" * 30)
    assert (artifact.missing(100), artifact.missing(20)) == (70, 0)
    artifact.finish({}, {}, 1.0)
    assert artifact.missing(10**9) == 0, "whatever was estimated"
