"""What happens around a run: its disk, its clock, MLflow's database, its target, its cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.faults.test_processes import SLOW
from tests.helpers.clock import patience
from tests.helpers.fault_processes import evaluator_at_work, logged, training_workers
from tests.helpers.fault_toy import (
    PATIENCE_S,
    Tally,
    Toy,
    artifact,
    check_whole,
    log_of,
    missing,
    outcome,
    tail,
    wait_until,
)
from tests.helpers.mlflow_server import mirrored
from tests.helpers.ray_cluster import ray_cluster

NO_LOCKS = """
import errno, fcntl, os

def flock(handle, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

fcntl.flock = flock
"""


@pytest.mark.long
@pytest.mark.fault("the file system turning read-only between two stages")
def test_a_disk_that_can_only_be_read_is_named(
    toy: Toy, tally: Tally, small_disk: Callable[[int], Path]
) -> None:
    expected, disk = toy.clean(), small_disk(64 * 1024)
    storage = disk / "runs"
    assert toy.run(storage, stage="train") == 0, tail(storage)
    log = log_of(storage).read_text()
    outside = toy.folder / "read-only.log"  # the run's own output cannot go beside the storage now
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    command = [sys.executable, "-m", "jobs", "run", str(toy.config), f"storage={storage}"]
    with outside.open("w") as file:
        done = subprocess.run([*command, "run.executor=inline"], stdout=file, stderr=subprocess.STDOUT)
    said = outside.read_text()
    assert done.returncode == 4 and "can only be read" in said and "resumes" in said, said[-3000:]
    assert "Traceback" not in said
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert log_of(storage).read_text() == log
    assert toy.run(storage) == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.long
@pytest.mark.fault("a file system without locks")
def test_a_disk_without_locks_is_named(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    """As an NFS mount without its lock daemon answers."""
    expected, storage = toy.clean(), tmp_path / "runs"
    (tmp_path / "sitecustomize.py").write_text(NO_LOCKS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert toy.run(storage, PYTHONPATH=path) == 4, tail(storage)
    assert "has no locks" in tail(storage) and "Traceback" not in tail(storage)
    assert toy.run(storage) == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.long
@pytest.mark.fault("a clock that jumps back an hour while a drafter trains")
def test_the_clock_jumps_back(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime (Debian's package faketime)")
    expected, storage, clock = toy.clean(), tmp_path / "runs", tmp_path / "clock"
    clock.write_text("+0")
    driver = toy.start(
        storage,
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        DONT_FAKE_MONOTONIC="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    wait_until(logged(storage, 1), driver, "a row of training")
    clock.write_text("-3600")
    assert driver.wait(patience(2 * PATIENCE_S)) == 0, tail(storage)
    assert toy.run(storage) == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.long
@pytest.mark.fault("the MLflow database restored from a copy that lacks the last pipeline")
def test_an_old_database_is_filled_again(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    """What is missing is mirrored again, and nothing of what the copy has is doubled."""
    storage, tracked = tmp_path / "runs", ("tracking.enabled=true",)
    database, copy = storage / "mlflow.db", tmp_path / "yesterday.db"

    def runs() -> dict[str, Any]:
        return mirrored(f"sqlite:///{database}", "budgetdraft")

    assert toy.run(storage, *tracked, "name=first", "seed=7") == 0, tail(storage)
    shutil.copyfile(database, copy)
    of_first = runs()
    assert toy.run(storage, *tracked) == 0, tail(storage)
    of_both = runs()
    shutil.copyfile(copy, database)
    assert runs() == of_first != of_both
    assert toy.run(storage, *tracked) == 0, tail(storage)
    tally.lost += missing(runs(), of_both)
    assert tally.lost == 0


@contextmanager
def other_weights(file: Path) -> Iterator[None]:
    """Other weights in a model's file, and the former ones again, to the time of their change."""
    kept = file.with_suffix(".kept")
    shutil.copy2(file, kept)
    weights = {name: 1.5 * value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    yield
    kept.replace(file)


@pytest.mark.long
@pytest.mark.fault("the target's files changed under a running pipeline")
def test_a_changed_target_is_noticed(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    """The target of the clean run, as a pretrained one."""
    toy.clean()
    made = artifact(toy.folder / "clean-0", "pretrain-target")
    assert made is not None
    target = shutil.copytree(made / "model", tmp_path / "target")
    pretrained = (
        f"target={{kind: pretrained, path: {target}}}", "data.tokenizer={kind: target}",
        "labels.sequences_per_shard=1", "labels.batch_sequences=1",
    )  # fmt: skip
    clean, storage = tmp_path / "clean", tmp_path / "runs"
    assert toy.run(clean, *pretrained) == 0, tail(clean)
    driver = toy.start(storage, *pretrained)
    wait_until(lambda: list(storage.glob("teach-*/labels/*.argmax.npy")), driver, "labels")
    with other_weights(target / "model.safetensors"):
        assert driver.wait(patience(2 * PATIENCE_S)) == 3, tail(storage)
        said = tail(storage)
        assert "target" in said and "was changed while this run used it (model.safetensors)" in said
        assert "Traceback" not in said
    assert toy.run(storage, *pretrained) == 0, tail(storage)
    check_whole(tally, storage, outcome(clean))


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.fault("an evaluator that hangs without dying")
def test_a_hanging_evaluator_is_given_up(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    expected, storage = toy.clean(SLOW), tmp_path / "runs"
    assert toy.run(storage, SLOW, stage="train") == 0, tail(storage)
    driver = toy.start(storage, SLOW, "run.stall_minutes=0.5", executor="ray")
    victim = evaluator_at_work(storage, driver)
    victim.send_signal(signal.SIGSTOP)
    assert driver.wait(patience(2 * PATIENCE_S)) == 4, tail(storage)
    assert "nothing has ended for 0.5 minutes" in tail(storage)
    assert not psutil.wait_procs([victim], timeout=patience(30))[1], "a stopped worker is left running"
    assert toy.run(storage, SLOW, executor="ray") == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(patience(900))
@pytest.mark.fault("a training rank that hangs without dying")
def test_a_hanging_rank_is_given_up(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    two = ("train.num_workers=2", "train.steps=80", "train.checkpoint_every=10")
    expected, storage = toy.clean(*two, executor="ray"), tmp_path / "runs"
    # Ranks of a slow machine take more than a minute to begin, which is no hanging.
    driver = toy.start(storage, *two, "run.stall_minutes=3", executor="ray")

    wait_until(logged(storage, 10), driver, "step 10")
    victim = training_workers(driver.pid)[0]
    victim.send_signal(signal.SIGSTOP)
    assert driver.wait(patience(2 * PATIENCE_S)) == 4, tail(storage)
    assert "nothing has ended for 3 minutes" in tail(storage)
    assert not psutil.wait_procs([victim], timeout=patience(30))[1], "a stopped worker is left running"
    assert toy.run(storage, *two, executor="ray") == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(patience(900))
@pytest.mark.fault("kill -9 of the cluster's head, and a new cluster on the same storage")
def test_another_cluster_goes_on(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    expected, storage = toy.clean(SLOW), tmp_path / "runs"
    assert toy.run(storage, SLOW, stage="train") == 0, tail(storage)
    with ray_cluster(head_cpus=2) as cluster:
        driver = toy.start(storage, SLOW, f"run.ray_address={cluster.address}", executor="ray")
        wait_until(lambda: "replay:" in log_of(storage).read_text(), driver, "replay")
        cluster.head_node.kill_gcs_server(check_alive=False)
        assert driver.wait(patience(2 * PATIENCE_S)) != 0, tail(storage)
    with ray_cluster(head_cpus=2) as cluster:
        address = f"run.ray_address={cluster.address}"
        assert toy.run(storage, SLOW, address, executor="ray") == 0, tail(storage)
    check_whole(tally, storage, expected)
