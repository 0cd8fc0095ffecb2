"""A run's record, written by hand-made runs and real ones, and what `budgetdraft status` says of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs import Terminated
from jobs.records.record import KEPT, RunRecord, RunStatus, StageRecord, WorkRecord, lives, prune
from jobs.records.status import View, find, show_status, span
from pipeline.config.schema import Config
from pipeline.errors import BadData, Incomplete
from pipeline.observe.progress import progress
from pipeline.observe.training import follow, look
from pipeline.store.artifacts import open_artifact
from pipeline.store.files import write_rows
from pipeline.store.rows import FailedCell
from tests.helpers.clock import patience, wait_for
from tests.helpers.fault_toy import ROOT, Toy, make_toy
from tests.helpers.rows import make
from tests.helpers.tiny import tiny_config

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
RUNS = """
import sys, time
from jobs.records.record import RunRecord
from pipeline.observe.progress import progress
from tests.helpers.tiny import tiny_config

with RunRecord(tiny_config({"storage": sys.argv[1]}), "report") as record:
    with record.stage("teach"), progress(8, "teach") as bar:
        bar.update(3)
        print(record.folder, flush=True)
        time.sleep(3600)
"""


def config_of(storage: Path, name: str = "toy") -> Config:
    return tiny_config({"storage": str(storage), "name": name})


def read(record: RunRecord) -> dict[str, Any]:
    record.write()
    return json.loads((record.folder / "status.json").read_text())


def took(record: dict[str, Any]) -> float:
    """Seconds of a run that has ended."""
    began, ended = (datetime.fromisoformat(record[key]) for key in ("started", "updated"))
    return (ended - began).total_seconds() + 1e-3  # those of stages are rounded


def status_of(**given: Any) -> RunStatus:
    """A record of a run that began 100 s before NOW."""
    began = NOW - timedelta(seconds=100)
    values: dict[str, Any] = {
        "name": "toy", "until": "report", "host": "here", "pid": 1, "config_fingerprint": "f",
        "started": began, "updated": NOW, "state": "running", "stages": [],
    }  # fmt: skip
    return RunStatus(**{**values, **given})


# ── what a run writes ─────────────────────────────────────────────────────────────────────────────


def test_a_record_follows_its_run(tmp_path: Path) -> None:
    with RunRecord(config_of(tmp_path), "teach") as record:
        assert record.folder.parent == tmp_path / "run-records" and record.folder.name.startswith("toy-")
        assert [stage["state"] for stage in read(record)["stages"]] == ["waiting"] * 3
        with record.stage("prepare") as stage:
            artifact = open_artifact(tmp_path, "prepare", {"a": 1})
            stage.cached = True
        with record.stage("teach"):
            with progress(2, "sample") as bar:
                bar.update(2)
            with progress(10, "teach", initial=4) as bar:
                for _ in range(3):
                    bar.update(1)
                bar.retried()
                bar.retried()
                bar.failed()
                found = read(record)
    assert {"name": "toy", "until": "teach", "pid": os.getpid(), "state": "running"}.items() <= found.items()
    prepare, pretrain, teach = found["stages"]
    assert (prepare["state"], prepare["cached"], prepare["folders"]) == ("done", True, [str(artifact.path)])
    assert pretrain["state"] == "waiting"
    assert (teach["state"], teach["failed"], teach["retried"]) == ("running", 1, 2)
    work = {
        key: teach["work"][key] for key in ("description", "initial", "done", "total", "failed", "retried")
    }
    assert list(work.values()) == ["teach", 4, 7, 10, 1, 2]
    ended = read(record)
    assert (ended["state"], ended["ended"]) == ("done", "")
    assert 0 <= prepare["seconds"] + ended["stages"][2]["seconds"] <= took(ended)
    assert ended["stages"][2]["state"] == "done" and ended["stages"][2]["work"] is None


@pytest.mark.parametrize(
    ("error", "state", "ended"),
    [
        (Incomplete("3 failures in the sweep\nmore"), "incomplete", "3 failures in the sweep"),
        (Terminated(), "killed", "terminated (SIGTERM)"),
        (KeyboardInterrupt(), "killed", "interrupted (Ctrl-C)"),
        (BadData("http://me:hidden@host is torn"), "failed", "BadData: http://***@host is torn"),
    ],
)
def test_how_a_run_ended(
    tmp_path: Path, error: BaseException, state: str, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs._received", set())  # what earlier tests have sent to this process
    with pytest.raises(type(error)), RunRecord(config_of(tmp_path), "report") as record:  # noqa: SIM117
        with record.stage("prepare"):
            raise error
    found = read(record)
    assert (found["state"], found["ended"], found["stages"][0]["state"]) == (state, ended, state)
    assert not lives(record.folder)
    assert (f"{state}: took" in (told := show_status(tmp_path, None, False))) and ended in told
    assert "the same command resumes" in told


def test_it_is_written_while_nothing_else_happens(tmp_path: Path) -> None:
    """By its own thread: long items bring no event for minutes."""
    with RunRecord(config_of(tmp_path), "report") as record, record.stage("prepare"):
        with progress(5, "read") as bar:
            bar.update(4)

        def written() -> bool:
            work = json.loads((record.folder / "status.json").read_text())["stages"][0]["work"]
            return bool(work) and work["done"] == 4

        wait_for(written, "status.json was written")


def test_training_is_read_from_its_metrics(tmp_path: Path) -> None:
    """On Ray it runs elsewhere. The files are rewritten from the checkpoint on when a run resumes."""
    config = tiny_config({"storage": str(tmp_path), "train.steps": 20})
    folders = {name: tmp_path / f"drafter-{name}-0" for name in ("full_only", "multi_view")}
    files = {name: folder / "metrics.jsonl" for name, folder in folders.items()}
    for folder in folders.values():
        folder.mkdir()
    files["full_only"].write_text('{"step": 10, "train/tokens_per_s": 5.0}\n{"step": 12}\n{"ste')
    with RunRecord(config, "report") as record, record.stage("train"), follow(files):
        work = record.status.stages[3].work
        assert work is not None and (work.initial, work.done, work.total) == (12, 12, 40)
        assert work.description == "steps of training drafter-full_only"
        files["full_only"].write_text('{"step": 10}\n')
        look(files)
        assert (work.initial, work.done) == (10, 10)
        with progress(20, "train full_only", 10) as bar:  # in one process the loop reports as well
            bar.update(1)
        (folders["full_only"] / "model").mkdir()
        files["multi_view"].write_text('{"step": 5}\n')
        look(files)
        assert (record.status.stages[3].work, work.done) == (work, 25)


def test_old_records_go_and_living_ones_stay(tmp_path: Path) -> None:
    records = tmp_path / "run-records"
    with RunRecord(config_of(tmp_path), "report") as living:
        living_too = living.folder
        for number in range(KEPT + 5):  # all of them newer
            (records / f"x-{2090 + number}0101T000000Z-0000").mkdir()
        prune(records)
        left = sorted(folder.name for folder in records.iterdir())
    assert living_too.name in left
    assert [name for name in left if name != living_too.name] == [
        f"x-{2090 + number}0101T000000Z-0000" for number in range(5, KEPT + 5)
    ]


def test_a_record_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file where the storage should be")
    with RunRecord(config_of(tmp_path / "runs"), "report") as record:
        with record.stage("prepare"), progress(1, "read") as bar:
            bar.update(1)
        record.write()
    assert capsys.readouterr().err.count("cannot be kept; the run goes on without") == 1


# ── what is said of it ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process, 3 of 8 items into teach."""
    command = [sys.executable, "-c", RUNS, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        wait_for(lambda: '"done": 3' in (folder / "status.json").read_text(), "3 were done", 60, process)
        yield process, folder
        process.kill()


@pytest.mark.slow
def test_a_killed_run_is_told_from_a_running_one(
    running: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, folder = running
    told = show_status(tmp_path, None, False)
    assert (
        "running: process" in told
        and "teach: 3 of 8" in told
        and "after that: train, sweep, report" not in told
    )
    assert "after that: prepare, pretrain, train, sweep, report" in told
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    told = show_status(tmp_path, None, False)
    assert "died: process" in told and "the same command resumes" in told and "left of this" not in told
    assert (
        json.loads(show_status(tmp_path, None, True)).items()
        >= {"state": "died", "work_left_s": None}.items()
    )
    assert json.loads((folder / "status.json").read_text())["state"] == "running"


def test_how_long_it_will_take(tmp_path: Path) -> None:
    """5 of 20 items, the first of which was there, in 40 s: 10 s an item."""
    work = WorkRecord(
        description="replay", began=NOW - timedelta(seconds=40), initial=1, done=5, total=20, failed=1
    )
    stages = [
        StageRecord(name="prepare", state="done", seconds=2.0, cached=True),
        StageRecord(name="sweep", state="running", started=NOW - timedelta(seconds=50), work=work, failed=1),
        StageRecord(name="report"),
    ]
    status = status_of(stages=stages)
    alone = View(tmp_path, status, False, NOW, [])
    assert alone.seconds_left(stages[1]) == 150
    assert list(alone.lines())[2:-1] == [
        "  prepare  cached",
        "  sweep    running, 50 s, replay: 5 of 20, 1 failed, about 2 min 30 s left of this",
        "  after that: report",
    ]
    earlier = [
        status_of(state="done", stages=[StageRecord(name="report", state="done", seconds=9.0, cached=True)]),
        status_of(state="done", stages=[StageRecord(name="report", state="done", seconds=70.0)]),
        status_of(state="failed", stages=[StageRecord(name="report", state="failed", seconds=3.0)]),
    ]
    view = View(tmp_path, status, False, NOW, earlier)
    assert list(view.lines())[-2] == "  after that: report (took 1 min 10 s in an earlier run)"
    assert view.as_json()["waiting"] == {"report": 70.0} and view.as_json()["work_left_s"] == 150
    nothing_yet = work.model_copy(update={"done": 1})
    assert alone.seconds_left(stages[1].model_copy(update={"work": nothing_yet})) is None


def test_failed_cells_are_named(tmp_path: Path) -> None:
    failed = [
        make(
            FailedCell, drafter="multi_view", dataset="tales", context="1K", policy="streaming", budget=16,
            gamma=0 if number else 4, mode="replay", prompt_id=f"p{number}",
            error=f"NotFinite: number {number} " + "x" * 200,
        )
        for number in range(7)
    ]  # fmt: skip
    write_rows(tmp_path / "sweep-0" / "failed" / "a.jsonl", failed)
    sweep = StageRecord(name="sweep", state="incomplete", seconds=1.0, folders=[str(tmp_path / "sweep-0")])
    view = View(tmp_path, status_of(state="incomplete", stages=[sweep]), False, NOW, [])
    told = list(view.lines())
    assert "failed cells  7; the first of them:" in told
    first, second = [line for line in told if line.startswith("  multi_view, ")][:2]
    assert first.startswith("  multi_view, tales, 1K, streaming, B = 16, γ = 4: NotFinite: number 0")
    assert "every γ: NotFinite: number 1" in second
    assert max(map(len, told[:-1])) <= 110 and len(told) < 24
    assert view.as_json()["failed_cells"] == 7


def test_runs_are_found_by_all_their_names(tmp_path: Path) -> None:
    folders = []
    for name in ("toy", "toy-2", "toy"):
        with RunRecord(config_of(tmp_path, name), "report") as record:
            folders.append(record.folder)
    first, other, last = folders
    for run, expected in (
        (None, last),
        ("toy", last),
        ("toy-2", other),
        (first.name, first),
        (first.name[:-1], first),
        (str(first), first),
        (str(first / "status.json"), first),
    ):
        assert find(tmp_path, run)[0] == expected, run
    with pytest.raises(BadData, match=f"no run 'nothing' .* {last.name}"):
        find(tmp_path, "nothing")
    with pytest.raises(BadData, match="name the storage folder with --storage"):
        find(tmp_path / "elsewhere", None)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.51, "0.5 s"), (59.6, "1 min 0 s"), (192, "3 min 12 s"), (7500, "2 h 5 min")]
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


# ── the command line ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("status"))


@pytest.mark.slow
def test_the_record_and_the_log_of_a_real_run(toy: Toy, tmp_path: Path) -> None:
    """Against the manifest of what it made."""
    storage = tmp_path / "runs"
    assert toy.run(storage, stage="prepare") == 0

    def status(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs", "status", "--storage", str(storage), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))

    assert status("nothing").returncode == 3
    done = status()
    assert done.returncode == 0 and "done: took" in done.stdout
    found = json.loads(status("--json").stdout)
    (made,) = storage.glob("prepare-*")
    manifest = json.loads((made / "manifest.json").read_text())
    (stage,) = found["stages"]
    assert (stage["state"], stage["cached"], stage["folders"]) == ("done", False, [str(made)])
    assert manifest["seconds"] <= stage["seconds"] <= took(found)
    written = [json.loads(line) for line in (Path(found["record"]) / "log.jsonl").read_text().splitlines()]
    cells = [line["item"] for line in written if line["message"] == "done" and line["item"]]
    assert set(manifest["counts"]["prompts"]) <= set(cells)
    assert {line["stage"] for line in written if line["item"]} == {"prepare"}
