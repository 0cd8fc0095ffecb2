"""Ray's metrics endpoint and the workers' logs after work on a real local Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

# Ray keeps a gauge for seconds.
pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Items 0 to 4: 1 kills its worker once, 3 each time. Apart, since Ray reads its settings once a process.
PIPELINE = """
import json, os, sys, time, urllib.request
from functools import partial
from pathlib import Path

from jobs.executors.ray_executor import RayExecutor
from jobs.records.record import RunRecord
from pipeline.observe.events import Evaluated, ModelInTraining, Training, tell
from tests.helpers.clock import patience
from tests.helpers.tiny import tiny_config

storage = Path(sys.argv[1])


def worker(marks):
    import os
    from pathlib import Path

    def work(item):
        mark = Path(marks) / str(item)
        if item == 3 or (item == 1 and not mark.exists()):
            mark.touch()
            os._exit(1)
        return item

    return work


def served(ray):
    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=patience(5)) as answer:
        return answer.read().decode()


config = tiny_config({"storage": str(storage), "run.executor": "ray", "run.cpus_per_task": 0.5})
with RunRecord(config, "report") as record:
    executor = RayExecutor(config)
    with record.stage("sweep"):
        lost = lambda item, why: item
        found = executor.map_actors(partial(worker, str(storage)), range(5), "replay", 2, "replay", lost)
        for item, _ in found:
            accepted = {("multi_view", "tales"): (item, 10)}
            tell(Evaluated(rows=4, cells=4, accepted=accepted, tokens=60, seconds=2.0))
        tell(Evaluated(failed=2, retried=3))
        time.sleep(6)  # longer than Ray keeps a gauge that nobody sets again
        (storage / "sweep.txt").write_text(served(executor.ray))
    with record.stage("train"):
        rows = [{"step": 10, "train/tokens_per_s": 1234.5}, {"step": 12, "validation/acceptance_b16": 0.5}]
        tell(Training([ModelInTraining("full_only", storage, rows, done=False)]))
        time.sleep(6)
        (storage / "train.txt").write_text(served(executor.ray))
    executor.close()
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What that run left."""
    folder = tmp_path_factory.mktemp("metrics")
    environment = {**os.environ, "RAY_metrics_report_interval_ms": "500"}
    command = [sys.executable, "-c", PIPELINE, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(240), check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def ours(page: Path) -> dict[tuple[str, ...], float]:
    """Our metrics of a page, by name and tags; Prometheus' own parser reads it."""
    found = {}
    for family in text_string_to_metric_families(page.read_text()):
        for sample in family.samples:
            name = sample.name.removeprefix("ray_")
            if name.startswith("budgetdraft_"):
                tags = [sample.labels[key] for key in ("stage", "drafter", "dataset") if key in sample.labels]
                found[name, *tags] = sample.value
    return found


def test_the_endpoint_serves_what_was_done(storage: Path) -> None:
    counted = {
        ("budgetdraft_items_done_total", "sweep"): 5,
        ("budgetdraft_items_retried_total", "sweep"): 1 + 2,
        ("budgetdraft_items_failed_total", "sweep"): 1,
        ("budgetdraft_cells_done_total", "sweep"): 5 * 4,
        ("budgetdraft_cells_failed_total", "sweep"): 2,
        ("budgetdraft_cells_retried_total", "sweep"): 3,
    }
    assert ours(storage / "sweep.txt") == counted | {
        ("budgetdraft_acceptance", "multi_view", "tales"): pytest.approx((0 + 1 + 2 + 3 + 4) / 50),
        ("budgetdraft_tokens_per_s", "sweep"): 30,
    }
    assert ours(storage / "train.txt") == counted | {("budgetdraft_tokens_per_s", "train"): 1234.5}


def test_workers_log_every_attempt(storage: Path) -> None:
    lines: list[dict[str, Any]] = []
    files = list(storage.glob("run-records/*/worker-*.jsonl"))
    for file in files:
        written = [json.loads(line) for line in file.read_text().splitlines()]
        assert {file.name} == {f"worker-{line['host']}-{line['pid']}.jsonl" for line in written}
        lines += written
    assert len(files) >= 4, "four workers died"
    told = Counter((line["item"], line["attempt"], line["message"]) for line in lines)
    once = [(str(item), 1, message) for item in (0, 2, 4) for message in ("begun", "done")]
    died = [("1", 1, "begun"), ("1", 2, "begun"), ("1", 2, "done"), *(("3", n, "begun") for n in (1, 2, 3))]
    assert told == Counter(once + died)
    assert {line["stage"] for line in lines} == {"sweep"}


def test_the_record_counts_the_same(storage: Path) -> None:
    (file,) = storage.glob("run-records/*/status.json")
    sweep = next(stage for stage in json.loads(file.read_text())["stages"] if stage["name"] == "sweep")
    assert (sweep["failed"], sweep["retried"]) == (1, 3)
