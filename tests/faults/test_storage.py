"""What happens to files: damaged, a full disk, two runs on one storage."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.clock import patience
from tests.helpers.fault_toy import Tally, Toy, artifact, check_whole, log_of, tail


def flip(file: Path) -> Path:
    """Change one bit of the middle byte."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def first(storage: Path, stage: str, pattern: str) -> Path:
    folder = artifact(storage, stage)
    assert folder is not None
    return min(folder.glob(pattern))


DAMAGE: dict[str, Callable[[Path], Path]] = {
    "a damaged shard of sequences": lambda s: flip(first(s, "prepare", "sequences/*.npy")),
    "a damaged file of labels": lambda s: flip(first(s, "teach", "labels/*.tokens.npy")),
    "a damaged drafter": lambda s: flip(first(s, "drafter-multi_view", "model/model.safetensors")),
    "a damaged file of rows": lambda s: flip(first(s, "sweep", "rows/*.jsonl")),
    "a damaged manifest": lambda s: flip(first(s, "teach", "manifest.json")),
}


def marks(name: str, always: bool) -> list[pytest.MarkDecorator]:
    """Of faults that are alike, two are tried by `make test-slow`."""
    return [pytest.mark.fault(name), pytest.mark.slow if always else pytest.mark.long]


OFTEN = ("a damaged file of labels", "a damaged manifest")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks(name, name in OFTEN)) for name in DAMAGE], ids=str
)
def test_damage_is_named_and_mended(toy: Toy, tally: Tally, tmp_path: Path, name: str, attempt: int) -> None:
    """The log names the file, what is not damaged is kept, and the end is as if nothing had been."""
    expected, storage = toy.clean(), tmp_path / "runs"
    assert toy.run(storage) == 0, tail(storage)
    file = DAMAGE[name](storage)
    written = {f: f.stat().st_mtime_ns for f in storage.glob("*-*/**/*") if f.is_file()}
    assert toy.run(storage) == 0, tail(storage)
    assert f"{file} is damaged or missing; it is made again" in log_of(storage).read_text()
    check_whole(tally, storage, expected)
    of_others = [f for f, time in written.items() if file.parent not in f.parents and f != file]
    kept = [f for f in of_others if f.exists() and f.stat().st_mtime_ns == written[f]]
    assert len(kept) > len(of_others) / 2


@pytest.mark.slow
@pytest.mark.fault("two identical runs at once on one storage")
def test_two_runs_share_the_work(toy: Toy, tally: Tally, tmp_path: Path, attempt: int) -> None:
    expected, storage = toy.clean(), tmp_path / "runs"
    both = [toy.start(storage), toy.start(storage)]
    assert [process.wait(patience(240)) for process in both] == [0, 0], tail(storage)
    check_whole(tally, storage, expected)
    made = [line for line in log_of(storage).read_text().splitlines() if ": done in " in line]
    stages = ["prepare", "pretrain", "teach", "train", "sweep"]
    # Whoever waits finds the work done; each stage was done at least once, and its work once.
    assert {line.split(": done in")[0].split()[-1] for line in made} >= set(stages)
    rates = [line for line in log_of(storage).read_text().splitlines() if "train multi_view: 100%" in line]
    assert len(rates) == 1


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(stage, marks=marks(f"disk full in stage {stage}", stage in ("teach", "train")))
        for stage in ("prepare", "pretrain", "teach", "train", "sweep", "report")
    ],
)
def test_a_full_disk_is_said_and_a_larger_one_ends_well(
    toy: Toy,
    tally: Tally,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    stage: str,
    attempt: int,
) -> None:
    """Every stage before is done; then there are only a few KiB left."""
    expected = toy.clean()
    disk = small_disk(64 * 1024)
    storage = disk / "runs"
    before = {"prepare": None, "pretrain": "prepare", "teach": "teach", "train": "teach"}
    until = before.get(stage, "train" if stage == "sweep" else "sweep")
    if until and stage != "teach":
        assert toy.run(storage, stage=until) == 0, tail(storage)
    elif stage == "teach":  # pretraining is a stage of its own only inside others
        assert toy.run(storage, stage="teach") == 0, tail(storage)
        folder = artifact(storage, "teach")
        assert folder is not None
        subprocess.run(["rm", "-r", str(folder)], check=True)
    used = int(subprocess.run(["du", "-sk", str(disk)], capture_output=True, text=True).stdout.split()[0])
    small_disk(used + 24)
    assert toy.run(storage) == 4, tail(storage)
    said = tail(storage)
    assert "a disk is full" in said and "the same command resumes" in said
    assert not list(storage.rglob("*.tmp"))
    small_disk(64 * 1024)
    assert toy.run(storage) == 0, tail(storage)
    check_whole(tally, storage, expected)
