"""Faults while drafters train: killed, terminated, damaged, diverged; then the same command again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.train.checkpoints import latest, step_of
from tests.helpers.clock import patience
from tests.helpers.fault_processes import FIRST, logged, training_workers
from tests.helpers.fault_toy import (
    PATIENCE_S,
    Tally,
    Toy,
    artifact,
    check_whole,
    log_of,
    outcome,
    tail,
    wait_until,
)

STEPS = 80
OVERRIDES = (f"train.steps={STEPS}", "train.checkpoint_every=10")
RARELY = (f"train.steps={STEPS}", "train.checkpoint_every=1000")  # rows of the log come every 10 steps anyway
TWO = "train.num_workers=2"


@pytest.fixture(scope="session")
def taught(toy: Toy) -> Path:
    """A storage whose stages before the drafters' training are done."""
    storage = toy.folder / "taught"
    assert toy.run(storage, *OVERRIDES, stage="teach") == 0, tail(storage)
    return storage


@pytest.fixture
def storage(taught: Path, tmp_path: Path) -> Path:
    return shutil.copytree(taught, tmp_path / "runs")


def clean(toy: Toy, taught: Path, *overrides: str, executor: str) -> dict[str, Any]:
    storage = shutil.copytree(taught, toy.folder / f"trained-{executor}")
    code = toy.run(storage, *OVERRIDES, *overrides, executor=executor, stage="train")
    assert code == 0, tail(storage)
    return outcome(storage)


@pytest.fixture(scope="session")
def expected(toy: Toy, taught: Path) -> dict[str, Any]:
    return clean(toy, taught, executor="inline")


@pytest.fixture(scope="session")
def expected_of_two(toy: Toy, taught: Path) -> dict[str, Any]:
    return clean(toy, taught, TWO, executor="ray")


def newest(storage: Path) -> Path:
    folder = artifact(storage, FIRST)
    assert folder is not None
    found = latest(folder)
    assert found is not None, tail(storage)
    return found


def check_stopped(process: subprocess.Popen[str], storage: Path, code: int) -> None:
    """The run was told to end: its code, and the checkpoint of a step that is none of the regular ones."""
    assert process.wait(timeout=patience(PATIENCE_S)) == code, tail(storage)
    assert 10 <= step_of(newest(storage)) < STEPS


@pytest.mark.slow
@pytest.mark.fault("SIGTERM of the driver while it trains in its own process")
def test_sigterm_inline(toy: Toy, storage: Path, expected: dict[str, Any], tally: Tally) -> None:
    process = toy.start(storage, *RARELY, stage="train")
    wait_until(logged(storage, 10), process, "step 10")
    process.terminate()
    check_stopped(process, storage, 143)
    assert toy.run(storage, *RARELY, stage="train") == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.slow
@pytest.mark.fault("the newest checkpoint damaged after a kill -9 of the driver")
def test_damaged_checkpoint(toy: Toy, storage: Path, expected: dict[str, Any], tally: Tally) -> None:
    process = toy.start(storage, *OVERRIDES, stage="train")
    wait_until(logged(storage, 40), process, "step 40")
    process.kill()
    process.wait()
    file = newest(storage) / "exp_avg.safetensors"
    content = bytearray(file.read_bytes())
    content[-100:] = bytes(100)
    file.write_bytes(bytes(content))
    assert toy.run(storage, *OVERRIDES, stage="train") == 0, tail(storage)
    assert f"{file} is damaged" in log_of(storage).read_text()
    check_whole(tally, storage, expected)


@pytest.mark.slow
@pytest.mark.fault("training that diverges")
def test_not_finite(toy: Toy, storage: Path, expected: dict[str, Any], tally: Tally) -> None:
    """A learning rate that no weights survive; with the right one in the config the same storage serves."""
    assert toy.run(storage, *OVERRIDES, "train.learning_rate=1e30", stage="train") == 4
    log = log_of(storage).read_text()
    assert re.search(r"training full_only: step \d+ is the first that is not finite \(.*norm nan\)", log)
    assert re.search(r"micro-batch 1: \S+\.tokens\.npy row \d+, \S+ row \d+\n", log)
    assert "last good checkpoint: none" in log
    diverged = artifact(storage, FIRST)
    assert diverged is not None and not (diverged / "manifest.json").exists()
    shutil.rmtree(diverged)  # of another fingerprint than the right rate's
    assert toy.run(storage, *OVERRIDES, stage="train") == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.long
@pytest.mark.timeout(patience(900))
@pytest.mark.fault("kill -9 of a training rank in the middle of an epoch")
def test_killed_rank(toy: Toy, storage: Path, expected_of_two: dict[str, Any], tally: Tally) -> None:
    process = toy.start(storage, *OVERRIDES, TWO, executor="ray", stage="train")
    wait_until(logged(storage, 20), process, "step 20")
    workers = training_workers(process.pid)
    assert len(workers) == 2
    os.kill(workers[-1].pid, signal.SIGKILL)
    assert process.wait(timeout=patience(2 * PATIENCE_S)) == 0, tail(storage)
    check_whole(tally, storage, expected_of_two)


@pytest.mark.long
@pytest.mark.timeout(patience(900))
@pytest.mark.fault("SIGTERM of the driver while two ranks train")
def test_sigterm_ray(toy: Toy, storage: Path, expected_of_two: dict[str, Any], tally: Tally) -> None:
    process = toy.start(storage, *RARELY, TWO, executor="ray", stage="train")
    wait_until(logged(storage, 10), process, "step 10")
    process.terminate()
    check_stopped(process, storage, 143)
    assert toy.run(storage, *RARELY, TWO, executor="ray", stage="train") == 0, tail(storage)
    check_whole(tally, storage, expected_of_two)
