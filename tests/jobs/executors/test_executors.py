"""Ray against the same work in this process: tasks, actors, their errors, and DeepSpeed training.

Functions that travel to Ray's workers stand at the top level.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from jobs.executors.choose import NoExecutor, make_executor
from jobs.executors.inline import InlineExecutor
from jobs.executors.ray_executor import RayExecutor
from jobs.executors.ray_train import disk_error, read_settings
from pipeline.errors import BadData, Incomplete, NotFinite
from pipeline.train.checkpoints import checkpoint_folder, latest
from pipeline.train.job import TrainJob, run_job
from pipeline.train.objectives import MultiView
from tests.helpers.paths import ROOT
from tests.helpers.tiny import Workshop, assert_same_run, tiny_config

# Half a CPU a worker, so that two train side by side wherever this runs.
RAY: dict[str, Any] = {"run.executor": "ray", "run.ray_address": "local", "run.cpus_per_task": 0.5}
PRETRAIN = {"steps": 2, "batch_sequences": 8}
BATCH = {
    "train.batch_sequences": 8,
    "train.steps": 8,
    "target.pretrain": PRETRAIN,
    "drafter.pretrain": PRETRAIN,
}


@pytest.fixture(params=["inline", "ray"])
def executor(request: pytest.FixtureRequest) -> InlineExecutor | RayExecutor:
    if request.param == "inline":
        return InlineExecutor(tiny_config())
    request.getfixturevalue("on_local_ray")
    return RayExecutor(tiny_config(RAY))


# ── tasks and actors ──────────────────────────────────────────────────────────────────────────────


def power(exponent: int, base: int) -> int:
    return base**exponent


def complain(number: int) -> int:
    if number == 2:
        raise BadData("row 2 of the file is empty")
    return number


def wait_in(folder: Path, number: int) -> int:
    """Item 1 does not end before the test does."""
    while number == 1 and not (folder / "over").exists():
        time.sleep(0.1)
    return number


@pytest.mark.ray
def test_work_in_which_nothing_ends_is_given_up(
    on_local_ray: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("jobs.executors.ray_executor.LOOK_S", 0.2)
    executor = RayExecutor(tiny_config({**RAY, "run.stall_minutes": 0.05}))
    try:
        with pytest.raises(Incomplete, match=r"wait: nothing has ended for 0.05 minutes, waiting for .*1"):
            list(executor.map(partial(wait_in, tmp_path), [0, 1], "wait"))
    finally:
        (tmp_path / "over").touch()


class Counter:
    """Counts its calls; a worker that is made once sees several."""

    def __init__(self, start: int) -> None:
        self.calls = start

    def __call__(self, item: int) -> tuple[int, int]:
        self.calls += 1
        return item * item, self.calls


def broken_factory() -> Callable[[int], int]:
    raise BadData("the model has no weights")


@pytest.mark.ray
def test_map_gives_every_pair(executor: InlineExecutor | RayExecutor) -> None:
    before = executor.calls
    assert sorted(executor.map(abs, [-3, 4, -5], "abs")) == [(-5, 5), (-3, 3), (4, 4)]
    assert sorted(executor.map(partial(power, 3), range(6), "cubes")) == [(n, n**3) for n in range(6)]
    assert list(executor.map(abs, [], "nothing")) == []
    assert executor.calls == before + 3


@pytest.mark.ray
def test_actors_are_made_once_and_share_the_items(executor: InlineExecutor | RayExecutor) -> None:
    pairs = sorted(executor.map_actors(partial(Counter, 10), range(7), "squares", 2, "teach"))
    assert [(item, square) for item, (square, _) in pairs] == [(n, n * n) for n in range(7)]
    calls = [count for _, (_, count) in pairs]
    assert calls.count(11) <= 2 and 14 <= max(calls) <= 17
    assert list(executor.map_actors(partial(Counter, 0), [5], "one", 4, "teach")) == [(5, (25, 1))]
    assert list(executor.map_actors(partial(Counter, 0), [], "none", 4, "teach")) == []


@pytest.mark.ray
def test_a_tasks_own_error_arrives(executor: InlineExecutor | RayExecutor) -> None:
    with pytest.raises(BadData, match="row 2 of the file is empty") as told:
        list(executor.map(complain, [1, 2, 3], "rows"))
    assert type(told.value) is BadData
    with pytest.raises(BadData, match="row 2"):
        list(executor.map_actors(partial(partial, complain), [1, 2, 3], "rows", 1, "teach"))
    with pytest.raises(BadData, match="the model has no weights"):
        list(executor.map_actors(broken_factory, [1, 2], "models", 1, "teach"))


def test_executors_are_chosen_by_the_config() -> None:
    assert isinstance(make_executor(tiny_config()), InlineExecutor)
    lazy = make_executor(tiny_config(RAY))
    assert isinstance(lazy, RayExecutor)
    lazy.close()  # Ray was never started


def test_reading_what_is_complete_does_no_work() -> None:
    nobody = NoExecutor()
    for ask in (
        lambda: nobody.map(abs, [1], "prepare"),
        lambda: nobody.map_actors(list, [1], "prepare", 1, "teach"),
    ):
        with pytest.raises(BadData, match="prepare is not done for this config"):
            ask()


def test_settings_that_cannot_be_read_name_the_field(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text("{")
    for name in ("torn.json", "absent.json"):
        with pytest.raises(BadData, match=r"train\.deepspeed: cannot read"):
            read_settings(str(tmp_path / name))


def test_a_full_disk_is_found_behind_what_ray_raises() -> None:
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    full, lost = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EPIPE, "Broken pipe")
    for failure in (full, UserExceptionWithTraceback(full, "Traceback …")):
        assert disk_error(WorkerGroupError("…", {0: lost, 1: failure})) is full
    assert disk_error(ControllerError(full)) is full
    assert disk_error(WorkerGroupError("…", {0: lost, 1: RuntimeError()})) is None


# ── training ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, make_model: Any) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("executor"), target, make_model(layers=1, seed=7))


@pytest.fixture(scope="module")
def inline(workshop: Workshop) -> Path:
    return workshop.train("inline", BATCH)


def ray_job(workshop: Workshop, name: str, stage: int, workers: int, more: dict[str, Any]) -> TrainJob:
    settings = {
        "train.deepspeed": str(ROOT / f"conf/deepspeed/zero{stage}.json"),
        "train.num_workers": workers,
    }
    return workshop.job(name, BATCH | RAY | settings | more)


def train_on_ray(job: TrainJob) -> Path:
    """The folder of the last variant."""
    RayExecutor(job.config).train(run_job, job)
    return list(job.outputs.values())[-1]


VARIANTS = [
    {"name": "untrained", "steps": 0, "budgets": {16: 1.0}},
    {"name": "multi_view", "budgets": {16: 0.6, 32: 0.4}},
]


@pytest.mark.ray
def test_two_workers_train_all_variants_as_one_does(
    on_local_ray: ModuleType, workshop: Workshop, inline: Path
) -> None:
    """ZeRO-3 over two processes, with a variant without steps, which only one of them may write."""
    job = ray_job(workshop, "two", 3, 2, {"train.variants": VARIANTS})
    assert_same_run(train_on_ray(job), inline)
    assert (job.outputs["untrained"] / "model" / "model.safetensors").exists()


class DoomedJob(TrainJob):
    """Where it is unpickled, which is in the workers, the second one is killed once, at step 6."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        whole, marker = MultiView.loss, next(iter(self.outputs.values())).parent / "killed"

        def loss(self: MultiView, model: PreTrainedModel, step: int, micro: int) -> Any:
            if step == 6 and dist.get_rank() == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, model, step, micro)

        MultiView.loss = loss  # type: ignore[method-assign]


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_losses_stay(
    on_local_ray: ModuleType, workshop: Workshop, inline: Path
) -> None:
    job = ray_job(workshop, "killed", 1, 2, {})
    folder = train_on_ray(DoomedJob(**vars(job)))
    assert (folder.parent / "killed").exists()
    assert_same_run(folder, inline)


class DivergingJob(TrainJob):
    """In the workers, the loss is NaN from step 6 on."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        whole = MultiView.loss

        def loss(self: MultiView, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, Any]:
            value, terms = whole(self, model, step, micro)
            return value, terms | {"total": terms["total"] * (float("nan") if step >= 6 else 1.0)}

        MultiView.loss = loss  # type: ignore[method-assign]


@pytest.mark.ray
@pytest.mark.long
def test_one_worker_trains_as_inline_after_it_diverged_and_was_mended(
    on_local_ray: ModuleType, workshop: Workshop, inline: Path
) -> None:
    """A loss that is not finite ends the launch without restarts; the next launch goes on from step 5."""
    job = ray_job(workshop, "diverged", 1, 1, {})
    with pytest.raises(NotFinite) as told:
        train_on_ray(DivergingJob(**vars(job)))
    text = str(told.value)
    assert "training multi_view: step 7 is the first that is not finite (total nan" in text
    assert f"checkpoint: {checkpoint_folder(job.outputs['multi_view'], 5)};" in text
    # Step 7 has the 8 sequences from number 48 on in the endless pass over 16; a micro-batch has two.
    order = np.random.default_rng([42, 3]).permutation(16)[:8]
    for micro in range(4):
        first, second = order[2 * micro : 2 * micro + 2]
        file = "shard-00000.tokens.npy"
        assert f"micro-batch {micro}: {file} row {first}, {file} row {second}\n" in text
    kept = latest(job.outputs["multi_view"])
    assert kept is not None and kept.name == "step-000005"
    assert_same_run(train_on_ray(job), inline)
