"""What a Ray cluster has room for, and whether its machines have the same software."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.executors import ray_cluster
from jobs.executors.ray_cluster import HELD, check_nodes, count_fitting, installed, request
from jobs.executors.ray_executor import RayExecutor
from jobs.executors.ray_pool import Worker
from pipeline.errors import BadData
from tests.helpers.tiny import tiny_config

RAY: dict[str, Any] = {"run.executor": "ray", "run.ray_address": "local", "run.cpus_per_task": 0.5}


def machines(*resources: dict[str, float], dead: int = 0) -> Any:
    """Stands in for the module ray: these machines live, and so many more have died."""
    nodes: list[dict[str, Any]] = [
        {"NodeID": str(number), "Alive": True, "Resources": given} for number, given in enumerate(resources)
    ]
    lost = {"CPU": 1000.0, "GPU": 8.0, "memory": 1e12}
    nodes += [{"NodeID": "dead", "Alive": False, "Resources": lost}] * dead
    here = SimpleNamespace(get_node_id=lambda: "0")  # this process runs on the first of them
    return SimpleNamespace(nodes=lambda: nodes, get_runtime_context=lambda: here)


def run_of(**changes: Any) -> Any:
    return tiny_config(
        {"run.executor": "ray", **{f"run.{name}": value for name, value in changes.items()}}
    ).run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cpus_per_task": 1}, 4 + 10),
        ({"cpus_per_task": 3}, 1 + 3),  # whole workers on each machine, not 14 // 3
        ({"cpus_per_task": 0.5}, 8 + 20),
        ({"resources": {"replay": {"memory_gb": 20}}}, 0 + 3),
        ({"resources": {"replay": {"cpus": 4, "memory_gb": 8}}}, 1 + 2),
        ({"resources": {"teach": {"cpus": 10}}}, 4 + 10),  # another kind of work
    ],
)
def test_room_is_counted_by_machine(changes: dict[str, Any], expected: int) -> None:
    ray = machines({"CPU": 4.0, "memory": 16e9}, {"CPU": 10.0, "memory": 64e9}, dead=2)
    assert count_fitting(ray, run_of(**changes), "replay") == expected


def test_what_the_jobs_own_process_holds_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = machines({"CPU": 2.0, "memory": 16e9}, {"CPU": 2.0, "memory": 16e9})
    assert count_fitting(ray, run_of(cpus_per_task=2), "train") == 2
    monkeypatch.setenv(HELD, '{"CPU": 1}')
    assert count_fitting(ray, run_of(cpus_per_task=2), "train") == 1
    assert count_fitting(ray, run_of(cpus_per_task=1), "train") == 1 + 2
    monkeypatch.setenv(HELD, '{"memory": 15e9}')
    assert count_fitting(ray, run_of(resources={"train": {"memory_gb": 2}}), "train") == 0 + 2


def test_drafters_share_a_gpu_and_the_target_has_one_alone() -> None:
    ray = machines({"CPU": 16.0, "GPU": 2.0, "memory": 64e9})
    run = run_of(device="cuda", gpus_per_task=1, resources={"replay": {"gpus": 0.25}})
    assert [count_fitting(ray, run, work) for work in ("replay", "measure", "prepare")] == [8, 2, 16]
    assert request(run, "replay")["num_gpus"] == 0.25 and request(run, "prepare")["num_gpus"] == 0


def test_what_fits_no_machine_is_told_with_its_field() -> None:
    ray = machines({"CPU": 4.0, "memory": 16e9}, {"CPU": 4.0, "memory": 16e9})
    with pytest.raises(
        BadData, match=r"replay work, which asks for 8 CPUs.*the largest have 4 CPUs.*lower\s"
    ):
        count_fitting(ray, run_of(cpus_per_task=8), "replay", at_least=1)
    with pytest.raises(BadData, match=r"run\.resources\.teach"):
        count_fitting(ray, run_of(resources={"teach": {"memory_gb": 17}}), "teach", at_least=1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"resources": {"measure": {"gpus": 1}}}, "resources.measure.gpus asks for GPUs"),
        (
            {"device": "cuda", "gpus_per_task": 1, "resources": {"teach": {"gpus": 0}}},
            "resources.teach.gpus is 0",
        ),
        (
            {"device": "cuda", "gpus_per_task": 0.5},
            "gpus_per_task is 0.5: a training worker needs a whole GPU",
        ),
        ({"device": "cuda", "gpus_per_task": 1, "resources": {"teach": {"gpus": 1.5}}}, "a whole number"),
    ],
)
def test_gpus_that_make_no_sense_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        run_of(**changes)


# ── on a real Ray ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.ray
@pytest.mark.parametrize("resources", [{"cpus": 1000}, {"memory_gb": 100_000}])
def test_what_can_never_be_placed_fails_before_it_is_asked_for(
    on_local_ray: ModuleType, resources: dict[str, float]
) -> None:
    executor = RayExecutor(tiny_config({**RAY, "run.resources": {"teach": resources}}))
    # Ray that can be asked what its machines have, and not for a worker.
    executor.__dict__["ray"] = SimpleNamespace(nodes=on_local_ray.nodes)
    with pytest.raises(BadData, match=r"no machine of the cluster can take teach work"):
        list(executor.map_actors(list, [1], "teach", 1, "teach"))


@pytest.mark.ray
def test_work_is_done_in_the_room_that_others_leave(on_local_ray: ModuleType) -> None:
    """Four workers are asked for, and there is room for one: no item waits for an actor that cannot start."""
    ray = on_local_ray
    cpus = ray.cluster_resources()["CPU"]
    other = ray.remote(num_cpus=cpus - 0.5)(Worker).remote(list)
    ray.get(other.ready.remote())
    executor = RayExecutor(tiny_config(RAY))
    pairs = sorted(executor.map_actors(lambda: abs, [-3, 4, -5, 6], "abs", 4, "teach"))
    ray.kill(other)
    assert pairs == [(-5, 5), (-3, 3), (4, 4), (6, 6)]


@pytest.mark.ray
def test_other_versions_on_a_machine_are_named(
    on_local_ray: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = on_local_ray
    check_nodes(ray)  # this machine is like itself
    here = installed()
    assert here["torch"] and here["budgetdraft (its code)"]
    monkeypatch.setattr(ray_cluster, "provenance", lambda: {"python": "3.99.0", "versions": {"torch": "9.9"}})
    with pytest.raises(BadData, match="machines of the cluster differ") as told:
        check_nodes(ray)
    (node,) = ray.nodes()
    machine = f"{node['NodeManagerAddress']} (node {node['NodeID'][:8]})"
    assert f"{machine} has torch {here['torch']}, this process has 9.9" in str(told.value)
    assert f"{machine} has python {here['python']}, this process has 3.99.0" in str(told.value)
    assert "code" not in str(told.value)


class Asked:
    """Stands in for the module ray where two machines are asked; the second one's answer is an error."""

    def __init__(self, error: Exception, dies: bool) -> None:
        from ray import exceptions

        self.exceptions, self.error, self.dies = exceptions, error, dies
        self.looks = 0

    def nodes(self) -> list[dict[str, Any]]:
        self.looks += 1
        names = ("a" * 56, "b" * 56)
        there = [True, self.looks == 1 or not self.dies]
        return [
            {"NodeID": name, "Alive": alive, "NodeManagerAddress": "192.0.2.2"}
            for name, alive in zip(names, there, strict=True)
        ]

    def remote(self, **options: Any) -> Any:
        answers = iter(("first", "second"))

        def ask(function: Any) -> Any:
            return SimpleNamespace(options=lambda **strategy: SimpleNamespace(remote=lambda: next(answers)))

        return ask

    def wait(self, asked: list[str], **options: Any) -> tuple[list[str], list[str]]:
        return asked, []

    def get(self, answer: str) -> Any:
        if answer == "second":
            raise self.error
        return installed()


def test_a_machine_that_dies_while_it_is_asked_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """As the soak had it: a node was killed while a new run compared the machines."""
    from ray.exceptions import TaskUnschedulableError, WorkerCrashedError

    check_nodes(Asked(TaskUnschedulableError("doesn't exist any more"), dies=False))  # type: ignore[arg-type]
    check_nodes(Asked(WorkerCrashedError(), dies=True))  # type: ignore[arg-type]
    assert caplog.text.count("left the cluster while it was asked") == 2
    with pytest.raises(BadData, match=r"node bbbbbbbb.* cannot run this project"):
        check_nodes(Asked(WorkerCrashedError(), dies=False))  # type: ignore[arg-type]
