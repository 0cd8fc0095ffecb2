"""`budgetdraft submit`: what is checked before anything is sent, and jobs on a real head."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from jobs.commands.submit import Job, connect, send, submit
from jobs.stages.pipeline import settled
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.helpers.clock import patience, wait_for
from tests.helpers.configs import MINIMAL
from tests.helpers.fault_toy import PATIENCE_S, artifact, make_toy
from tests.helpers.heads import BIN, Head, ray_head
from tests.helpers.mlflow_server import free_port
from tests.helpers.paths import ROOT

NASTY = ("$(touch x); '\"", "`touch x`", "a\nb", "*", "~", "\\", "; touch x #", "'", "")


def test_no_argument_reaches_a_shell(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    printer = tmp_path / "bin" / "python"
    printer.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    printer.chmod(0o755)
    overrides = [f"data.root={text}" for text in NASTY] + [f"name={text}" for text in NASTY]
    config = tmp_path / "$(touch x);'\".yaml"
    command = Job("train", config, overrides).entry_point(tmp_path)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    printed = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert printed.split("\0")[:-1] == ["-m", "jobs", "train", config.name, *overrides]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]


def test_a_config_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"toy\.yaml is not below .*/here, the working directory"):
        Job("run", tmp_path / "here" / ".." / "toy.yaml", []).entry_point(tmp_path / "here")


def test_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    job = Job("run", tmp_path / "toy.yaml", ["tracking.uri=http://ann:s3cret@host:5000"])
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        job.entry_point(tmp_path)
    assert "s3cret" not in str(caught.value)


def minimal(**changes: object) -> Config:
    return Config.model_validate({**copy.deepcopy(MINIMAL), **changes})


def test_a_relative_storage_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    job = Job("run", tmp_path / "toy.yaml", [])
    with pytest.raises(ConfigError, match="storage = runs: a Ray job runs in a copy"):
        submit(minimal(), job, "http://127.0.0.1:1", wait=False)


def test_inside_a_job_a_relative_storage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_ray = {"executor": "ray", "device": "cpu"}
    assert Path(settled(minimal(run=on_ray)).storage).is_absolute()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match="storage = runs: a Ray job runs in a copy"):
        settled(minimal(run=on_ray))
    assert settled(minimal(run=on_ray, storage="/shared/runs")).storage == "/shared/runs"


class Starting:
    """A head's job server that takes a job at the third time of asking."""

    asked = 0

    def submit_job(self, **_: object) -> str:
        self.asked += 1
        if self.asked < 3:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, …")
        return "raysubmit_1"


def test_a_head_that_still_starts_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.commands.submit.POLL_S", 0.0)
    job, head, slow = Job("run", tmp_path / "toy.yaml", []), Starting(), Starting()
    assert send(head, job, "true", tmp_path, "toy") == "raysubmit_1"  # type: ignore[arg-type]
    assert head.asked == 3
    monkeypatch.setattr("jobs.commands.submit.STARTING_S", -1.0)
    with pytest.raises(ConfigError, match=r"the cluster did not take the job: .* No available agent"):
        send(slow, job, "true", tmp_path, "toy")  # type: ignore[arg-type]
    assert slow.asked == 1


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto"])
def test_an_address_that_is_no_dashboards_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"--address .*: the dashboard's address is asked for"):
        connect(address)


def command_line(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs", "submit", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=patience(2 * PATIENCE_S),
    )


def test_nobody_at_the_address_and_a_wrong_config_exit_with_2(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(MINIMAL))
    nobody = f"http://127.0.0.1:{free_port()}"
    given = ("toy.yaml", "--storage", str(tmp_path / "runs"), "--address", nobody)
    environment = {"PYTHONPATH": str(ROOT)}
    done = command_line(tmp_path, *given, **environment)
    assert done.returncode == 2 and f"no Ray job server answers at {nobody}" in done.stderr
    assert "RAY_API_SERVER_ADDRESS" in done.stderr
    done = command_line(tmp_path, *given, "train.stops=3", **environment)
    assert done.returncode == 2 and "train.stops is no field" in done.stderr


def test_an_address_that_says_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections, and Ray's client would wait for an answer for ever."""
    monkeypatch.setattr("jobs.commands.submit.ANSWER_S", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(
            ConfigError, match=f"{address} says nothing for 0.2 s: .*--address or RAY_API_SERVER"
        ):
            connect(address)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code and a config, as a checkout has them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "pipeline", "kernels", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    shutil.copy(toy.config, folder / "toy.yaml")
    return folder


def job_id(text: str) -> str:
    found = re.search(r"\braysubmit_\w+", text)
    assert found, text
    return found[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_is_followed_to_its_end(head: Head, checkout: Path, tmp_path: Path) -> None:
    given = ("toy.yaml", "--storage", str(tmp_path / "runs"), "--executor", "ray", "--stage", "prepare")
    resources = ("--entrypoint-cpus", "0.5", "--entrypoint-memory-gb", "0.1", "--stop-wait-s", "77")
    done = command_line(checkout, *given, *resources, "--wait", **head.environment)
    assert done.returncode == 0, done.stderr + done.stdout
    first, *_, last = done.stdout.split()
    assert first == job_id(done.stderr)
    assert Path(last) == artifact(tmp_path / "runs", "prepare") and (Path(last) / "manifest.json").exists()
    for verb in ("status", "logs --follow", "stop"):
        assert f"ray job {verb} --address {head.address} {first}" in done.stderr
    told = head.job(first)
    assert told["metadata"].keys() == {"name", "stage", "git_commit", "submitted_by"}
    assert (told["metadata"]["name"], told["metadata"]["stage"]) == ("minimal", "prepare")
    commit = told["metadata"]["git_commit"]
    variables = told["runtime_env"]["env_vars"]
    assert json.loads(variables.pop("BUDGETDRAFT_HELD_BY_ENTRYPOINT")) == {"CPU": 0.5, "memory": 1e8}
    assert variables == {"RAY_JOB_STOP_WAIT_TIME_S": "77", "BUDGETDRAFT_COMMIT": commit}
    manifest = json.loads((Path(last) / "manifest.json").read_text())
    sha, _, mark = commit.partition("+")
    known = manifest["provenance"]
    assert (known["git_sha"], known["git_dirty"]) == (sha, mark == "dirty")
    assert head.token not in str(told)
    actors = head.get("/api/v0/actors?detail=true")["data"]["result"]["result"]
    supervisor = next(actor for actor in actors if first in actor["name"])
    assert supervisor["required_resources"] == {"CPU": 0.5, "memory": 10**8}


@pytest.mark.ray
@pytest.mark.slow
def test_an_entry_point_that_fits_no_node_is_refused_at_once(
    head: Head, checkout: Path, tmp_path: Path
) -> None:
    given = ("toy.yaml", "--storage", str(tmp_path), "--entrypoint-memory-gb", "100000")
    done = command_line(checkout, *given, **head.environment)
    assert done.returncode == 2 and "--entrypoint-memory-gb 100000 fit no node of the cluster" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_jobs_own_exit_code_comes_back(head: Head, checkout: Path, tmp_path: Path) -> None:
    given = ("toy.yaml", f"data.root={tmp_path / 'nowhere'}", "--storage", str(tmp_path), "--wait")
    done = command_line(checkout, *given, **head.environment)
    assert done.returncode == 3 and "bad data" in done.stdout, done.stderr + done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_refused_token_says_what_to_set(head: Head, checkout: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    for token in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": str(wrong)}):
        done = command_line(checkout, "toy.yaml", "--storage", str(tmp_path), **(head.environment | token))
        assert done.returncode == 2 and "does not take our token" in done.stderr
        assert "RAY_AUTH_TOKEN_PATH" in done.stderr


def ray_job(head: Head, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "ray"), "job", *arguments],
        cwd=cwd,
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        timeout=patience(2 * PATIENCE_S),
    )


@pytest.mark.ray
@pytest.mark.slow
def test_rays_own_submit_refuses_a_relative_storage(head: Head, checkout: Path) -> None:
    entry = ("python", "-m", "jobs", "prepare", "toy.yaml", "run.executor=ray")
    done = ray_job(head, checkout, "submit", "--working-dir", ".", "--", *entry)
    assert done.returncode == 1 and "storage = runs: a Ray job runs in a copy" in done.stdout, done.stdout


@pytest.mark.ray
@pytest.mark.long
def test_a_job_is_left_then_stopped_then_resumed(head: Head, checkout: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    changes = ("tracking.enabled=true", "train.steps=400", "train.checkpoint_every=20", "run.executor=ray")
    given = ("toy.yaml", *changes, f"storage={storage}")
    following = subprocess.Popen(
        [sys.executable, "-m", "jobs", "submit", *given, "--wait"],
        cwd=checkout,
        env={**os.environ, **head.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def checkpointed() -> bool:
        assert following.poll() is None, following.communicate()
        return any(storage.glob("drafter-*/checkpoints/*"))

    wait_for(checkpointed, "the first checkpoint", PATIENCE_S)
    following.send_signal(signal.SIGINT)
    output, said = following.communicate(timeout=patience(PATIENCE_S))
    job = job_id(output)
    assert following.returncode == 130 and f"the job {job} goes on" in said
    assert head.job(job)["status"] == "RUNNING"

    stopped = ray_job(head, checkout, "stop", job)
    assert stopped.returncode == 0, stopped.stdout
    assert head.job(job)["status"] == "STOPPED"
    assert statuses(storage) == {"minimal": "KILLED"}
    assert not any((folder / "manifest.json").exists() for folder in storage.glob("drafter-multi_view-*"))

    entry = ("python", "-m", "jobs", "run", *given)
    done = ray_job(head, checkout, "submit", "--working-dir", ".", "--", *entry)
    assert done.returncode == 0, done.stdout
    assert sorted(statuses(storage).values()) == ["FINISHED"]
    report = artifact(storage, "report")
    assert report and (report / "summary.json").exists()


def statuses(storage: Path) -> dict[str, str]:
    """The newest pipeline run of each name, read from MLflow's database; no run may be left as running."""
    with closing(sqlite3.connect(storage / "mlflow.db")) as database:
        running = database.execute("select count(*) from runs where status = 'RUNNING'").fetchone()[0]
        assert running == 0
        rows = database.execute(
            "select name, status from runs join tags on tags.run_uuid = runs.run_uuid "
            "where tags.key = 'stage' and tags.value = 'pipeline' order by start_time"
        ).fetchall()
    return dict(rows)
