"""`budgetdraft artifacts`: what it lists, and that it removes what nothing needs and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from jobs.commands.artifacts import TRASH, list_artifacts, removable, remove
from pipeline.errors import BadData
from pipeline.store.artifacts import Artifact, open_artifact
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

DAY_S = 86_400


def make(
    storage: Path, stage: str, inputs: dict[str, Any], size: int = 1000, finish: bool = True
) -> Artifact:
    artifact = open_artifact(storage, stage, inputs)
    artifact.path.mkdir(parents=True)
    (artifact.path / "data.bin").write_bytes(b"x" * size)
    if finish:
        artifact.finish(inputs, {}, 1.0)
    return artifact


class Shelf:
    """A reported pipeline, a trained drafter that no report uses, and a stage that was left half-made.

    Fingerprints stand in manifests as stages write them: plain, in lists, in nested groups.
    """

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.prepare = make(storage, "prepare", {"data": 1}, 5000)
        self.target = make(storage, "pretrain-target", {"prepare": self.prepare.fingerprint})
        self.teach = make(
            storage, "teach", {"prepare": self.prepare.fingerprint, "target": self.target.fingerprint}
        )
        self.drafter = self.drafted("multi_view")
        self.other = self.drafted("full_only")
        inputs = {"teach": self.teach.fingerprint, "drafters": {"multi_view": self.drafter.fingerprint}}
        self.sweep = make(storage, "sweep", inputs)
        self.half = make(storage, "sample", {"prepare": self.prepare.fingerprint}, finish=False)
        self.report = make(storage, "report", {"sweep": self.sweep.fingerprint, "rows": {"a.jsonl": "00"}})
        self.needed = {
            a.path.name
            for a in (self.prepare, self.target, self.teach, self.drafter, self.sweep, self.report)
        }

    def drafted(self, name: str) -> Artifact:
        inputs = {"teach": self.teach.fingerprint, "variant": {"name": name}}
        return make(self.storage, f"drafter-{name}", inputs)

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.storage.iterdir() if not path.name.startswith(".")}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "runs")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", "artifacts", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience(60),
    )


def test_it_lists_states_sizes_and_users(shelf: Shelf) -> None:
    (shelf.other.path / "manifest.json").write_text('{"stage": ')
    (shelf.storage / "mlflow.db").write_bytes(b"y" * 300)
    with FileLock(shelf.storage / ".locks" / f"{shelf.half.path.name}.lock"):
        told = json.loads(command(shelf.storage, "--json").stdout)
    by_name = {one["name"]: one for one in told["artifacts"]}
    assert by_name.keys() == shelf.names - {"mlflow.db"}
    states = {name: one["state"] for name, one in by_name.items()}
    assert states == dict.fromkeys(shelf.needed, "complete") | {
        shelf.other.path.name: "damaged",
        shelf.half.path.name: "in use",
    }
    teach = by_name[shelf.teach.path.name]
    # The damaged drafter's inputs cannot be read.
    assert teach["used_by"] == [shelf.drafter.path.name, shelf.sweep.path.name]
    assert (teach["stage"], teach["fingerprint"]) == ("teach", shelf.teach.fingerprint)
    sizes = {
        a.path.name: sum(f.stat().st_size for f in a.path.iterdir()) for a in (shelf.teach, shelf.prepare)
    }
    assert {name: by_name[name]["bytes"] for name in sizes} == sizes
    assert told["artifacts"][0]["name"] == shelf.prepare.path.name
    assert told["beside"] == {"mlflow.db": 300}
    assert told["bytes"] == 300 + sum(one["bytes"] for one in by_name.values())


def test_what_improving_came_to_is_kept_and_what_came_to_nothing_goes(shelf: Shelf) -> None:
    served = make(shelf.storage, "served-multi_view", {"drafter": shelf.drafter.fingerprint})
    stands = make(shelf.storage, "improved-multi_view", {"served": served.fingerprint})
    judged = make(shelf.storage, "evidence-multi_view", {"drafter": stands.fingerprint})
    gate = make(shelf.storage, "gate-multi_view", {"candidate": judged.fingerprint})
    ended = make(shelf.storage, "improve", {"gates": [gate.fingerprint]})
    make(shelf.storage, "served-full_only", {"drafter": shelf.other.fingerprint})
    report = shelf.report.path / "data.bin"
    report.write_bytes(report.read_bytes())  # the youngest: nothing is kept because it is new
    kept = {one.path.name for one in (served, stands, judged, gate, ended)}
    told = json.loads(command(shelf.storage, "--remove", "--json").stdout)
    assert not kept & set(told["removed"]) and kept < shelf.names
    assert shelf.other.path.name in told["removed"]


def test_the_table_says_the_same(shelf: Shelf) -> None:
    lines = command(shelf.storage).stdout.splitlines()
    assert lines[0].split() == ["STAGE", "FINGERPRINT", "STATE", "SIZE", "AGE", "USED", "BY"]
    (line,) = [line for line in lines if line.startswith("sweep ")]
    assert line.split()[1:3] == [shelf.sweep.fingerprint, "complete"] and shelf.report.path.name in line
    (line,) = [line for line in lines if line.startswith("sample ")]
    assert line.split()[2] == "unfinished" and line.endswith("nothing")
    assert len([line for line in lines if "in 8 artifacts and 0 others" in line]) == 1


def test_a_dry_run_tells_what_remove_does(shelf: Shelf) -> None:
    before, unneeded = shelf.names, {shelf.other.path.name, shelf.half.path.name}
    freed = sum(f.stat().st_size for name in unneeded for f in (shelf.storage / name).iterdir())
    told = json.loads(command(shelf.storage, "--remove", "--dry-run", "--json").stdout)
    assert (set(told["would_remove"]), told["freed"]) == (unneeded, freed)
    assert shelf.names == before
    told = json.loads(command(shelf.storage, "--remove", "--json").stdout)
    assert (set(told["removed"]), told["freed"]) == (unneeded, freed)
    assert shelf.names == shelf.needed
    assert not list(shelf.storage.glob(".trash-*"))


def test_without_remove_nothing_goes(shelf: Shelf) -> None:
    before = shelf.names
    assert command(shelf.storage).returncode == 0
    assert shelf.names == before
    done = command(shelf.storage, "--dry-run")
    assert done.returncode == 2 and "--dry-run goes with --remove" in done.stderr


def test_what_is_in_use_stays_and_so_does_what_it_may_use(shelf: Shelf) -> None:
    """The run at work may be about to sweep the drafter that no report uses yet."""
    free = make(shelf.storage, "teach", {"left": "half-made"}, finish=False)
    for path in (free.path, *free.path.iterdir()):
        os.utime(path, (0, 0))  # long before the report
    with FileLock(shelf.storage / ".locks" / f"{shelf.half.path.name}.lock"):
        done = command(shelf.storage, "--remove")
    assert shelf.names == shelf.needed | {shelf.half.path.name, shelf.other.path.name}
    assert f"removed {free.path.name}" in done.stdout and shelf.half.path.name in done.stdout


def test_what_is_younger_than_every_report_may_get_one(shelf: Shelf) -> None:
    young = shelf.drafted("young")
    begun = make(shelf.storage, "sample", {"prepare": "again"}, finish=False)
    command(shelf.storage, "--remove")
    # The one that is begun may use any of those that are complete.
    assert shelf.names == shelf.needed | {young.path.name, begun.path.name, shelf.other.path.name}
    shutil.rmtree(begun.path)
    command(shelf.storage, "--remove")
    assert shelf.names == shelf.needed | {young.path.name}


def test_a_run_between_two_stages_counts_as_at_work(shelf: Shelf) -> None:
    record = shelf.storage / "run-records" / "toy-20260101T000000Z-abcd"
    record.mkdir(parents=True)
    with FileLock(record / "alive.lock"):
        command(shelf.storage, "--remove")
    assert shelf.other.path.exists() and not shelf.half.path.exists()
    command(shelf.storage, "--remove")
    assert not shelf.other.path.exists()


def test_what_an_unfinished_but_reported_sweep_uses_stays(shelf: Shelf) -> None:
    """A sweep with failures has a report and no manifest, and wants its drafters when it is tried again."""
    (shelf.sweep.path / "manifest.json").unlink()
    command(shelf.storage, "--remove")
    assert shelf.names == shelf.needed | {shelf.other.path.name}


def test_a_damaged_report_keeps_what_is_complete(shelf: Shelf) -> None:
    manifest = shelf.report.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"created": "20', '"created": "19'))
    assert command(shelf.storage, "--remove").returncode == 0
    assert shelf.names == shelf.needed | {shelf.other.path.name}


def test_only_what_is_old_enough_goes(shelf: Shelf) -> None:
    for path in (shelf.other.path, *shelf.other.path.iterdir()):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3 * DAY_S))
    command(shelf.storage, "--remove", "--older-than-days", "4")
    assert shelf.other.path.exists() and shelf.half.path.exists()
    command(shelf.storage, "--remove", "--older-than-days", "2")
    assert not shelf.other.path.exists() and shelf.half.path.exists()


def test_a_killed_removal_leaves_no_half_artifact(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        (path / "data.bin").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(shelf.storage, removable(list_artifacts(shelf.storage), 0, sure=True))
    assert shelf.names == shelf.needed
    left = list(shelf.storage.glob(f"{TRASH}*"))
    assert left and any(".trash-" in line for line in command(shelf.storage).stdout.splitlines())
    command(shelf.storage, "--remove")
    assert not any(path.exists() for path in left)


def test_what_a_run_takes_at_the_last_moment_stays(shelf: Shelf) -> None:
    chosen = removable(list_artifacts(shelf.storage), 0, sure=True)
    with FileLock(shelf.storage / ".locks" / f"{shelf.other.path.name}.lock"):
        gone = remove(shelf.storage, chosen)
    assert [one.name for one in gone] == [shelf.half.path.name] and shelf.other.path.exists()


def test_a_link_to_a_folder_elsewhere_is_left_alone(shelf: Shelf, tmp_path: Path) -> None:
    elsewhere = shelf.other.path.rename(tmp_path / "elsewhere")
    shelf.other.path.symlink_to(elsewhere)
    command(shelf.storage, "--remove")
    assert (elsewhere / "data.bin").exists()


@pytest.mark.parametrize("fill", [lambda folder: None, lambda folder: (folder / "notes-2024").mkdir()])
def test_a_folder_that_is_no_storage_is_an_error(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    fill(tmp_path)
    with pytest.raises(BadData, match="holds no artifacts"):
        list_artifacts(tmp_path)
    assert command(tmp_path / "absent").returncode == 3
