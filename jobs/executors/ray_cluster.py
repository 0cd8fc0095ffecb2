"""What the machines of a Ray cluster have: room for work, and the same software."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.config.run import Run, Work
from pipeline.errors import BadData
from pipeline.store.provenance import provenance

log = logging.getLogger(__name__)

# Environment variable of a submitted job: resources that its own process holds, by Ray's names, as JSON.
HELD = "BUDGETDRAFT_HELD_BY_ENTRYPOINT"
ANSWER_S = 60.0  # a machine that has not said by then what is installed on it counts as broken


def request(run: Run, work: Work) -> dict[str, Any]:
    """Ray's options for one worker of a kind of work."""
    needs = run.needs(work)
    options: dict[str, Any] = {"num_cpus": needs.cpus, "num_gpus": needs.gpus}
    if needs.memory_gb:
        options["memory"] = int(needs.memory_gb * 1e9)
    if needs.cpus != run.cpus_per_task:
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(needs.threads)}}
    return options


def machines(ray: ModuleType) -> list[dict[str, float]]:
    """The resources of every machine that is alive, less those that this job's own process holds."""
    held = json.loads(os.environ.get(HELD, "{}"))
    driver_node = ray.get_runtime_context().get_node_id() if held else None
    return [
        {
            name: amount - (held.get(name, 0) if node["NodeID"] == driver_node else 0)
            for name, amount in node["Resources"].items()
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def count_fitting(ray: ModuleType, run: Run, work: Work, at_least: int = 0) -> int:
    """How many workers of a kind fit the machines that are alive, if no other job ran there.

    Raises:
        BadData: if fewer than `at_least` do. Ray itself would wait for ever.
    """
    needs = run.needs(work)
    asked = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": (needs.memory_gb or 0) * 1e9}
    wanted = {name: amount for name, amount in asked.items() if amount}
    alive = machines(ray)
    room = sum(
        min((int(have.get(name, 0) / amount) for name, amount in wanted.items()), default=1_000_000)
        for have in alive
    )
    if room < at_least:
        most = {
            name: max((have.get(name, 0) for have in alive), default=0) for name in ("CPU", "GPU", "memory")
        }
        raise BadData(
            f"no machine of the cluster can take {work} work, which asks for {needs.cpus:g} CPUs, "
            f"{needs.gpus:g} GPUs and {needs.memory_gb or 0:g} GB of memory: of {len(alive)} machines the "
            f"largest have {most['CPU']:g} CPUs, {most['GPU']:g} GPUs, {most['memory'] / 1e9:.1f} GB; lower "
            f"run.resources.{work} (or run.cpus_per_task, run.gpus_per_task)"
        )
    return room


def installed() -> dict[str, str | None]:
    """What results depend on: Python, the libraries, and this project's own code by content."""
    known = provenance()
    root = Path(__file__).resolve().parents[2]
    code = hashlib.sha256()
    for package in ("kernels", "pipeline", "jobs"):
        for file in sorted((root / package).rglob("*.py")):
            code.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return {"python": known["python"], **known["versions"], "budgetdraft (its code)": code.hexdigest()[:12]}


def check_nodes(ray: ModuleType) -> None:
    """Compare what is installed on every machine with what is here; a machine that dies meanwhile is let go.

    Raises:
        BadData: naming the machine and everything that differs, or a machine that does not answer.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(installed)
    here, problems = installed(), []
    asked = {
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): (node["NodeID"], f"{node['NodeManagerAddress']} (node {node['NodeID'][:8]})")
        for node in ray.nodes()
        if node["Alive"]
    }
    errors = ray.exceptions
    dying = (errors.TaskUnschedulableError, errors.NodeDiedError, errors.LocalRayletDiedError)

    def gone(node_id: str) -> bool:
        return all(node["NodeID"] != node_id for node in ray.nodes() if node["Alive"])

    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    for answer, (node_id, machine) in asked.items():
        if answer not in answered:
            if not gone(node_id):
                problems.append(f"{machine} did not say within {ANSWER_S:g} s what is installed there")
            continue
        try:
            there = ray.get(answer)
        except errors.RayError as error:
            if isinstance(error, dying) or gone(node_id):
                log.warning("%s left the cluster while it was asked what is installed there", machine)
            else:
                problems.append(f"{machine} cannot run this project: {str(error).strip().splitlines()[-1]}")
            continue
        problems += [
            f"{machine} has {name} {there.get(name)}, this process has {version}"
            for name, version in here.items()
            if there.get(name) != version
        ]
    if problems:
        raise BadData(
            "the machines of the cluster differ; install the same versions on all of them:\n"
            + "\n".join(problems)
        )
