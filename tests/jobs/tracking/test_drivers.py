"""Several drivers that mirror into one MLflow store: at once, and after one of them was killed."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.mlflow_address import tracking_uri
from jobs.records.record import RunRecord
from jobs.tracking.tracker import Tracker
from pipeline.config.schema import Config
from tests.helpers.clock import patience
from tests.helpers.configs import MINIMAL

START_TOGETHER = """
import sys, time
from pathlib import Path
from jobs.records.record import RunRecord
from jobs.tracking.tracker import Tracker
from mlflow import MlflowClient  # so that both open the database at the same moment
from pipeline.config.schema import Config
config, own, go = Config.model_validate_json(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
own.touch()
while not go.exists():
    time.sleep(0.001)
with Tracker.start(config) as tracker, tracker.stage_run("prepare"):
    pass
"""


@pytest.mark.slow
def test_two_processes_make_a_new_database(tmp_path: Path) -> None:
    storage, go = tmp_path / "storage", tmp_path / "go"
    config = Config.model_validate(MINIMAL | {"storage": str(storage), "tracking": {"experiment": "both"}})
    ready = [tmp_path / name for name in ("one", "two")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", START_TOGETHER, config.model_dump_json(), str(own), str(go)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in ready
    ]
    while not all(own.exists() for own in ready):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    go.touch()
    for process in processes:
        _, errors = process.communicate(timeout=patience(120))
        assert process.returncode == 0, errors

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    assert {e.name for e in client.search_experiments()} == {"Default", "both"}
    experiment = client.get_experiment_by_name("both")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == ["minimal"] * 2 + ["prepare"] * 2
    assert {run.info.status for run in runs} == {"FINISHED"}


LIVE = """
import sys, time
from jobs.records.record import RunRecord
from jobs.tracking.tracker import Tracker
from pipeline.config.schema import Config
config = Config.model_validate_json(sys.argv[1])
with RunRecord(config, "report") as record, Tracker.start(config, record.folder) as tracker:
    with tracker.stage_run("prepare") as run:
        while not run.id:
            time.sleep(0.01)
        print(tracker.run.id, run.id, flush=True)
        sys.stdin.read()
"""


@pytest.mark.slow
def test_runs_of_a_killed_driver_are_ended_by_the_next(tmp_path: Path) -> None:
    config = Config.model_validate(MINIMAL | {"storage": str(tmp_path), "tracking": {"experiment": "kill"}})
    client = MlflowClient(tracking_uri(config))
    call = [sys.executable, "-c", LIVE, config.model_dump_json()]
    with ExitStack() as stack:
        killed, living = (
            stack.enter_context(
                subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        )
        assert killed.stdout and living.stdout and living.stdin
        runs, alive = killed.stdout.readline().split(), living.stdout.readline().split()
        killed.kill()
        killed.wait()
        with RunRecord(config, "report") as record, Tracker.start(config, record.folder):
            pass
        assert [client.get_run(one).info.status for one in runs] == ["KILLED", "KILLED"]
        assert [client.get_run(one).info.status for one in alive] == ["RUNNING", "RUNNING"]
        living.stdin.close()
    assert [client.get_run(one).info.status for one in alive] == ["FINISHED", "FINISHED"]
