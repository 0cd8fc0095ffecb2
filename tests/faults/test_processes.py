"""kill -9 of what does the work: data tasks, evaluators, whole nodes, the driver."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.faults.test_storage import marks
from tests.helpers.fault_processes import evaluator_at_work, workers
from tests.helpers.fault_toy import (
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
from tests.helpers.ray_cluster import lose, ray_cluster, raylet

# Python's sources take long enough to encode that a task can be met at work.
STDLIB = (
    'data.sources=[{"kind": "text", "name": "stdlib", "files": ["stdlib"], "test_fraction": 0.2, '
    '"validation_fraction": 0.1}]'
)
# So that a slice of prompts takes long enough to be met at work.
SLOW = f"sweep.gammas={[*range(1, 65)]}"


def finish(driver: subprocess.Popen[str], storage: Path) -> None:
    assert driver.wait(300) == 0, tail(storage)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.fault("kill -9 of a data task")
def test_a_killed_data_task_is_done_again(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    expected = toy.clean(STDLIB)
    driver = toy.start(storage, STDLIB, executor="ray", stage="prepare")
    wait_until(lambda: log_of(storage).exists() and "encode" in log_of(storage).read_text(), driver, "encode")
    (victim, *_) = wait_until(lambda: workers(driver, "call"), driver, "a task at work")
    victim.kill()
    finish(driver, storage)
    assert "attempt 1 of" in log_of(storage).read_text()
    prepared = {name: piece for name, piece in expected.items() if name.startswith("prepare-")}
    tally.lost += missing(outcome(storage), prepared)
    assert tally.lost == 0 and prepared


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.fault("kill -9 of an evaluator in the middle of its cells")
def test_a_killed_evaluator_is_replaced(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    expected, storage = toy.clean(SLOW), tmp_path / "runs"
    assert toy.run(storage, SLOW, stage="train") == 0, tail(storage)
    driver = toy.start(storage, SLOW, executor="ray")
    evaluator_at_work(storage, driver).kill()
    finish(driver, storage)
    assert "replay: attempt 1 of" in log_of(storage).read_text()
    check_whole(tally, storage, expected)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.fault("kill -9 of a whole Ray node while it evaluates")
def test_a_node_is_lost_and_the_others_finish(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    expected, storage = toy.clean(SLOW), tmp_path / "runs"
    assert toy.run(storage, SLOW, stage="train") == 0, tail(storage)
    with ray_cluster(head_cpus=0, nodes=2) as cluster:
        options = [
            SLOW,
            f"run.ray_address={cluster.address}",
            "run.cpus_per_task=1",
            "sweep.num_evaluators=2",
        ]
        driver = toy.start(storage, *options, executor="ray")
        wait_until(lambda: "replay:" in log_of(storage).read_text(), driver, "replay")
        victim = next(iter(cluster.worker_nodes))
        wait_until(lambda: workers(raylet(victim), "Worker.call"), driver, "an evaluator on the node")
        lose(cluster, victim)
        finish(driver, storage)
    assert "replay: attempt 1 of" in log_of(storage).read_text()
    check_whole(tally, storage, expected)


@pytest.mark.parametrize(
    ("stage", "pattern"),
    [
        pytest.param(
            stage,
            pattern,
            marks=marks(f"kill -9 of the driver in stage {stage}", stage in ("train", "sweep")),
        )
        for stage, pattern in (
            ("prepare", "prepare-*/documents/*"),
            ("pretrain", "pretrain-target-*/checkpoints/*/complete.json"),
            ("teach", "teach-*/labels/*.argmax.npy"),
            ("train", "drafter-full_only-*/checkpoints/*/complete.json"),
            ("sweep", "sweep-*/rows/*.jsonl"),
        )
    ],
)
def test_the_driver_is_killed_and_the_same_command_resumes(
    toy: Toy, tally: Tally, tmp_path: Path, stage: str, pattern: str, attempt: int
) -> None:
    expected, storage = toy.clean(), tmp_path / "runs"
    driver = toy.start(storage)
    wait_until(lambda: list(storage.glob(pattern)), driver, pattern)
    os.killpg(driver.pid, signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert toy.run(storage) == 0, tail(storage)
    check_whole(tally, storage, expected)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.fault("kill -9 of the driver on Ray while it evaluates")
def test_the_driver_on_ray_is_killed(toy: Toy, tally: Tally, tmp_path: Path) -> None:
    expected, storage = toy.clean(SLOW), tmp_path / "runs"
    assert toy.run(storage, SLOW, stage="train") == 0, tail(storage)
    driver = toy.start(storage, SLOW, executor="ray")
    wait_until(lambda: (s := artifact(storage, "sweep")) and list(s.glob("rows/*.jsonl")), driver, "rows")
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    # At once: whatever of Ray still runs must not spoil what the next run makes.
    assert toy.run(storage, SLOW) == 0, tail(storage)
    for process in psutil.wait_procs(family, timeout=0)[1]:
        process.kill()  # Ray's own idle agents may stay for minutes
    check_whole(tally, storage, expected)
