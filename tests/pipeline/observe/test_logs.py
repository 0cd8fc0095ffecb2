"""The lines of structured logs, of the driver and of other processes."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.documents import Part, Shard
from pipeline.data.packing import EncodedPart, Packing
from pipeline.observe import logs
from pipeline.sweep.evaluator import CalibrateTask, ReplayTask
from pipeline.train.target.teacher import ContinueTask, LabelTask
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

WORKER = """
import logging, sys
from pipeline.observe import logs

for cell in sys.argv[1:]:
    try:
        with logs.item(logs.WorkItem("sweep", cell, 2)):
            logging.getLogger("pipeline.sweep.evaluator").info("half way")
            logging.getLogger("some.library").info("chatter")
            if cell == "bad":
                raise ValueError("no answer from http://me:hidden@host/x")
    except ValueError:
        logging.getLogger("pipeline.sweep.evaluator").warning("to stderr")
"""


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_says_where_it_was_logged(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    with logs.logging_to(tmp_path):
        log = logging.getLogger("pipeline.train")
        log.info("outside")
        with logs.at(logs.WorkItem("teach")), logs.item(logs.WorkItem("teach", "shard-00003", 2)):
            log.warning("inside, %d of %d", 1, 2)
        try:
            raise OSError("torn")
        except OSError:
            log.exception("it broke")
    log.info("after the run")
    outside, begun, inside, done, broke = lines(tmp_path / "log.jsonl")
    who = {"host": socket.gethostname(), "pid": os.getpid()}
    where = {"stage": "teach", "item": "shard-00003", "attempt": 2}
    assert (
        outside.items() >= {"level": "INFO", "logger": "pipeline.train", "message": "outside", **who}.items()
    )
    assert outside["stage"] is outside["item"] is outside["attempt"] is None
    assert inside.items() >= {"level": "WARNING", "message": "inside, 1 of 2", **where, **who}.items()
    assert [begun["message"], done["message"]] == ["begun", "done"] and done.items() >= where.items()
    assert broke["message"].startswith("it broke\nTraceback") and broke["message"].endswith("OSError: torn")
    times = [datetime.fromisoformat(line["time"]) for line in (outside, begun, inside, done, broke)]
    assert times == sorted(times) and before.replace(microsecond=0) <= times[0] <= datetime.now(UTC)


def test_another_process_writes_its_own_file(tmp_path: Path) -> None:
    with logs.logging_to(tmp_path):  # its environment is what the worker inherits
        command = [sys.executable, "-c", WORKER, "good", "bad"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=patience(60), check=True
        )
        assert logs.times_begun("sweep", "bad") == 1 and logs.times_begun("teach", "bad") == 0
    (file,) = tmp_path.glob("worker-*.jsonl")
    written = lines(file)
    assert file.name == f"worker-{socket.gethostname()}-{written[0]['pid']}.jsonl"
    assert written[0]["pid"] != os.getpid()
    told = [(line["item"], line["attempt"], line["message"]) for line in written]
    assert told == [
        ("good", 2, "begun"),
        ("good", 2, "half way"),
        ("good", 2, "done"),
        ("bad", 2, "begun"),
        ("bad", 2, "half way"),
        ("bad", 2, "failed"),
        (None, None, "to stderr"),
    ]
    assert written[2]["seconds"] >= 0
    assert written[5]["error"] == "ValueError" and written[5]["text"] == "no answer from http://***@host/x"
    assert done.stderr == "to stderr\n", "warnings still reach the worker's stderr, and nothing else does"


def test_credentials_are_hidden(tmp_path: Path) -> None:
    with logs.logging_to(tmp_path):
        logging.getLogger("jobs.tracking").info("MLflow at https://me:hidden@host:5000/x")
    assert "hidden" not in (tmp_path / "log.jsonl").read_text()


def test_a_full_disk_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with logs.logging_to(tmp_path), logs.item(logs.WorkItem("teach", "a", 1)):
        logging.getLogger("pipeline.train.target.teacher").info("more")
    told = capsys.readouterr().err
    assert told.count("No space left on device") == 1 and "log.jsonl" in told


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"a": 1}\n{"b": 2, "c\n{"d": 4}\n{"e"')
    assert list(logs.read_lines(file)) == [{"a": 1}, {"d": 4}]


def test_items_are_named_by_their_files() -> None:
    part = Part(file="tales-train-00001.jsonl", source="tales", split="train", documents=[])
    encoded = EncodedPart(file=part.file, documents=[], counts=[], num_too_short=0)
    shard = Shard(source="tales", split=None, index=7, tables=())
    folder = Path("/runs/sweep-0/rows")
    assert logs.name_of((object(), shard)) == "tales-any-00007"
    assert logs.name_of((part, {"d"})) == logs.name_of(part) == "tales-train-00001.jsonl"
    assert logs.name_of(Packing(3, encoded, ())) == "train-00003"
    assert logs.name_of(LabelTask(Path("a.npy"), 0, 8, 0, 5)) == "shard-00005"
    assert logs.name_of(ContinueTask(Path("p/test-tales-64.jsonl"))) == "test-tales-64.jsonl"
    assert logs.name_of(ReplayTask(Path("p"), (), 0, 8, folder / "replay-0.jsonl")) == "replay-0.jsonl"
    assert logs.name_of(CalibrateTask("1K", 1024, folder / "1K.jsonl")) == "1K.jsonl"
    assert logs.name_of(17) == "17"
