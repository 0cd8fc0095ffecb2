"""The workflows of .github: what they may do, what becomes of typed inputs, and a real run of sweep.yml."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.clock import patience
from tests.helpers.documents import story
from tests.helpers.heads import ray_head
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.paths import ROOT
from tests.helpers.toys import toy_config
from tests.helpers.workflow import own_command, read_workflow, run_job

CI, SWEEP = (ROOT / ".github" / "workflows" / name for name in ("ci.yml", "sweep.yml"))
WORKFLOWS = pytest.mark.parametrize("path", [CI, SWEEP], ids=lambda path: path.stem)
PINNED = re.compile(r"uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
# What a runner gives to every step.
OF_RUNNER = {"GITHUB_ENV", "GITHUB_PATH", "GITHUB_STEP_SUMMARY", "RUNNER_TEMP", "PWD"}


def jobs(path: Path) -> list[dict[str, Any]]:
    return list(read_workflow(path)["jobs"].values())


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path) for step in job["steps"]]


@WORKFLOWS
def test_actions_are_pinned_by_commit(path: Path) -> None:
    lines = [line.strip().removeprefix("- ") for line in path.read_text().splitlines() if "uses:" in line]
    assert lines and [line for line in lines if not PINNED.match(line)] == []


@WORKFLOWS
def test_a_workflow_may_read_the_code_and_nothing_else(path: Path) -> None:
    workflow = read_workflow(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] <= 350 for job in jobs(path))
    assert "group" in workflow["concurrency"] and "pull_request_target" not in workflow["on"]
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(jobs(path))
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@WORKFLOWS
def test_no_expression_is_part_of_a_shells_text(path: Path) -> None:
    """GitHub fills expressions in before the shell reads the text, so that they could hold commands."""
    scripts = [step["run"] for step in steps(path) if "run" in step]
    assert scripts and [script for script in scripts if "${{" in script] == []
    assert read_workflow(path)["defaults"]["run"]["shell"] == "bash"  # with pipefail


@WORKFLOWS
def test_every_variable_of_a_step_is_set(path: Path) -> None:
    workflow = read_workflow(path)
    for job in jobs(path):
        known = OF_RUNNER | set(workflow.get("env", {})) | set(job.get("env", {}))
        for step in job["steps"]:
            script = step.get("run", "")
            used = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", script))
            assert used <= known | set(step.get("env", {})), step["name"]
            known |= set(re.findall(r'echo "([A-Z_]+)=.*>> "\$GITHUB_ENV"', script))


def test_ci_runs_what_contributors_run() -> None:
    assert ".ci/run" in [step.get("run") for step in steps(CI)]


def test_the_docs_name_every_setting_of_sweep() -> None:
    used = set(re.findall(r"\b(?:vars|secrets)\.(\w+)", SWEEP.read_text()))
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == used


@pytest.mark.parametrize("program", ["actionlint", "shellcheck"])
def test_linters_find_nothing(program: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; ci.yml installs it")
    if program == "actionlint":
        command = [program, str(CI), str(SWEEP)]
    else:
        scripts = [step["run"] for path in (CI, SWEEP) for step in steps(path) if "run" in step]
        for number, script in enumerate(scripts):
            (tmp_path / f"{number}.sh").write_text(f"#!/bin/bash\n{script}")
        command = [program, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stdout + done.stderr


# ── the steps of sweep.yml, with programs that only write down what they are told ────────────────────

STAND_IN = """#!/bin/sh
printf '%s\\0' "$@" >> "$RUNNER_TEMP/$1"
case "$1" in
submit)
    echo raysubmit_1; echo "a log line"; echo /data/runs/report-1/summary.json
    sleep "${SUBMIT_S:-0}"; exit "${SUBMIT_CODE:-0}" ;;
gate) mkdir -p gate; echo "## Gate: fail" > gate/gate.md; exit "${GATE_CODE:-0}" ;;
check-server) mkdir -p check; echo "## Server: fail" > check/check.md; exit "${SERVER_CODE:-0}" ;;
esac
"""
GIVEN = {
    "inputs.config": "conf/my config.yaml",
    "secrets.RAY_TOKEN": "s3cret",
    "vars.RAY_API_SERVER_ADDRESS": "http://head:8265",
    "vars.MLFLOW_TRACKING_URI": "http://outside:5000",
    "vars.CLUSTER_MLFLOW_URI": "http://inside:5000",
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("budgetdraft", "python", "ray"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return folder


def run_sweep(
    tmp_path: Path, programs: Path, cancelled_in: str | None = None, **inputs: str
) -> dict[str, str]:
    given = GIVEN | {f"inputs.{name}": value for name, value in inputs.items()}
    return run_job(SWEEP, "sweep", tmp_path, tmp_path / "runner", given, programs, cancelled_in)


def told(tmp_path: Path, command: str) -> list[str]:
    return (tmp_path / "runner" / command).read_text().split("\0")[:-1]


def test_overrides_are_split_as_a_shell_does_and_never_run(tmp_path: Path, programs: Path) -> None:
    overrides = "train.steps=5 'name=$(touch x); `touch x`' \"data.root=/a b\" name=$(touch${IFS}x) * --help"
    outcomes = run_sweep(tmp_path, programs, overrides=overrides)
    assert set(outcomes.values()) == {"success", "skipped"} and outcomes["Stop the job"] == "skipped"
    assert told(tmp_path, "submit") == [
        "submit", "--storage", "/data/runs", "--wait", "--", "conf/my config.yaml",
        "registry.model=budgetdraft", "tracking.uri=http://inside:5000", *shlex.split(overrides),
    ]  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_only_who_asks_for_it_promotes(tmp_path: Path, programs: Path) -> None:
    for inputs, wanted in (({}, False), ({"promote": "false"}, False), ({"promote": "true"}, True)):
        shutil.rmtree(tmp_path / "runner", ignore_errors=True)
        run_sweep(tmp_path, programs, overrides="", **inputs)
        gate = told(tmp_path, "gate")
        assert gate[:7] == [
            "gate",
            "--baseline",
            "champion",
            "--candidate",
            "raysubmit_1",
            "--output",
            "gate",
        ]
        assert ("--promote" in gate) is wanted
        assert told(tmp_path, "submit")[-1] == "tracking.uri=http://inside:5000"  # no empty override


@pytest.mark.parametrize(
    ("event", "variable", "promotes"),
    [("schedule", "true", True), ("schedule", "", False), ("workflow_dispatch", "true", False)],
)
def test_only_scheduled_runs_go_by_the_variable(
    tmp_path: Path, programs: Path, event: str, variable: str, promotes: bool
) -> None:
    given = {name: value for name, value in GIVEN.items() if not name.startswith("inputs.")}
    given |= {"github.event_name": event, "vars.SWEEP_PROMOTE": variable, "vars.SWEEP_GATE": "strict.yaml"}
    outcomes = run_job(SWEEP, "sweep", tmp_path, tmp_path / "runner", given, programs)
    assert set(outcomes.values()) == {"success", "skipped"}
    gate = told(tmp_path, "gate")
    assert ("--promote" in gate) is promotes and gate[gate.index("--config") + 1] == "strict.yaml"
    assert "conf/quickstart.yaml" in told(tmp_path, "submit")


def test_a_cancelled_run_stops_its_job_and_decides_nothing(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMIT_S", "600")
    outcomes = run_sweep(tmp_path, programs, cancelled_in="Submit and follow")
    assert outcomes == {
        "Token": "success", "Submit and follow": "cancelled", "Stop the job": "success",
        "Gate": "skipped", "Server": "skipped", "Promote": "skipped", "Report": "skipped",
        "Remove the token": "success",
    }  # fmt: skip
    assert told(tmp_path, "job") == ["job", "stop", "raysubmit_1"]
    assert not (tmp_path / "runner" / "ray-token").exists()


def test_a_run_that_is_cancelled_before_it_submits_stops_no_job(tmp_path: Path, programs: Path) -> None:
    (programs / "xargs").write_text("#!/bin/sh\necho splitting >&2\nsleep 600\n")
    (programs / "xargs").chmod(0o755)
    outcomes = run_sweep(tmp_path, programs, cancelled_in="Submit and follow")
    assert (outcomes["Submit and follow"], outcomes["Stop the job"]) == ("cancelled", "success")
    assert not (tmp_path / "runner" / "job").exists() and not (tmp_path / "runner" / "submit").exists()


def test_a_refused_drafter_is_published_all_the_same(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATE_CODE", "5")
    outcomes = run_sweep(tmp_path, programs)
    assert (outcomes["Gate"], outcomes["Report"]) == ("failure", "success")
    assert (tmp_path / "runner" / "GITHUB_STEP_SUMMARY").read_text() == "## Gate: fail\n"


def test_a_server_is_checked_between_gate_and_promotion(tmp_path: Path, programs: Path) -> None:
    options = "--gamma 3 --window 256 '--drafter=$(touch x)'"
    outcomes = run_sweep(
        tmp_path, programs, promote="true", server="http://127.0.0.1:8000", server_options=options
    )
    assert [name for name in outcomes if name in ("Gate", "Server", "Promote")] == [
        "Gate",
        "Server",
        "Promote",
    ]
    assert {outcomes[name] for name in ("Gate", "Server", "Promote")} == {"success"}
    assert told(tmp_path, "check-server") == [
        "check-server", "http://127.0.0.1:8000", "--results", "/data/runs/report-1/summary.json",
        "--output", "check", "--registered", "raysubmit_1", "--model", "budgetdraft",
        "--gamma", "3", "--window", "256", "--drafter=$(touch x)",
    ]  # fmt: skip
    assert told(tmp_path, "gate").count("--promote") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("code", ["5", "6", "3", "4"])
def test_a_server_that_does_not_pass_stops_the_promotion(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("SERVER_CODE", code)
    outcomes = run_sweep(tmp_path, programs, promote="true", server="http://127.0.0.1:8000")
    assert [outcomes[name] for name in ("Gate", "Server", "Promote", "Report")] == [
        "success", "failure", "skipped", "success",
    ]  # fmt: skip
    assert "--promote" not in told(tmp_path, "gate")
    assert told(tmp_path, "check-server")[-2:] == ["--gamma", "4"]
    summary = (tmp_path / "runner" / "GITHUB_STEP_SUMMARY").read_text()
    assert summary == "## Gate: fail\n## Server: fail\n"


def test_no_server_is_asked_where_none_is_named_or_the_gate_refuses(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = run_sweep(tmp_path, programs, promote="true", server="")
    assert (outcomes["Server"], outcomes["Promote"]) == ("skipped", "success")
    monkeypatch.setenv("GATE_CODE", "5")
    outcomes = run_sweep(tmp_path, programs, promote="true", server="http://127.0.0.1:8000")
    assert (outcomes["Gate"], outcomes["Server"], outcomes["Promote"]) == ("failure", "skipped", "skipped")
    assert not (tmp_path / "runner" / "check-server").exists()


@pytest.mark.parametrize("event", ["schedule", "workflow_dispatch"])
def test_only_scheduled_runs_check_the_server_of_the_variable(
    tmp_path: Path, programs: Path, event: str
) -> None:
    given = {name: value for name, value in GIVEN.items() if not name.startswith("inputs.")}
    given |= {"github.event_name": event, "vars.SWEEP_SERVER": "http://staging:8000"}
    given |= {"vars.SWEEP_SERVER_OPTIONS": "--gamma 2"}
    outcomes = run_job(SWEEP, "sweep", tmp_path, tmp_path / "runner", given, programs)
    assert outcomes["Server"] == ("success" if event == "schedule" else "skipped")
    if event == "schedule":
        server = told(tmp_path, "check-server")
        assert (server[1], server[-2:]) == ("http://staging:8000", ["--gamma", "2"])


def test_nothing_follows_a_job_that_failed_and_the_token_goes(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUBMIT_CODE", "4")
    outcomes = run_sweep(tmp_path, programs)
    assert outcomes["Submit and follow"] == "failure"
    assert outcomes["Gate"] == outcomes["Server"] == outcomes["Promote"] == outcomes["Report"] == "skipped"
    assert outcomes["Remove the token"] == "success" and not (tmp_path / "runner" / "ray-token").exists()
    written = [path for path in (tmp_path / "runner").rglob("*") if path.is_file()]
    assert written and not any("s3cret" in path.read_text() for path in written)


# ── and for real ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name in ("jobs", "pipeline", "kernels", "conf", ".github"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"tale{number:02d}.txt").write_text(story(number))

    def change(values: dict[str, Any]) -> None:
        """As many documents as conf/gate.yaml asks for, and a drafter that only training makes good."""
        values["data"]["sources"][0]["test_fraction"] = 0.6
        values["data"]["prompts"] = 24
        values["drafter"]["pretrain"]["steps"] = 1
        values["train"] |= {"steps": 60, "learning_rate": 1e-2}
        values["sweep"]["mode"] = "replay"
        values["tracking"] = {"enabled": True}
        values["run"]["executor"] = "ray"

    values = toy_config(corpus, tmp_path / "unused", change).model_dump(mode="json")
    (folder / "toy.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path) as server:
        yield server


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(patience(1200))
def test_sweep_runs_gates_promotes_and_refuses(checkout: Path, server: MlflowServer, tmp_path: Path) -> None:
    """A tenth of the training makes the first champion, all of it the next; then the tenth is refused."""
    from mlflow import MlflowClient

    with ray_head() as head:
        given = {
            "inputs.config": "toy.yaml",
            "inputs.promote": "true",
            "secrets.RAY_TOKEN": head.token,
            "vars.RAY_API_SERVER_ADDRESS": head.address,
            "vars.MLFLOW_TRACKING_URI": server.uri,
            "vars.SWEEP_STORAGE": str(tmp_path / "runs"),
        }
        champions, verdicts = [], []
        for number, overrides in enumerate(("train.steps=6", "", "train.steps=6")):
            folder = tmp_path / f"runner{number}"
            shutil.rmtree(checkout / "gate", ignore_errors=True)
            outcomes = run_job(
                SWEEP, "sweep", checkout, folder, given | {"inputs.overrides": overrides},
                own_command(folder / "bin"),
            )  # fmt: skip
            said = {path.stem: path.read_text()[-2000:] for path in folder.glob("*.log")}
            assert outcomes["Submit and follow"] == outcomes["Report"] == "success", said
            verdicts.append(json.loads((checkout / "gate" / "gate.json").read_text())["verdict"])
            assert outcomes["Gate"] == ("failure" if number == 2 else "success"), said
            summary = (folder / "GITHUB_STEP_SUMMARY").read_text()
            assert summary == (checkout / "gate" / "gate.md").read_text()
            client = MlflowClient(server.uri)
            champions.append(client.get_model_version_by_alias("budgetdraft", "champion").version)
    assert verdicts == ["pass", "pass", "fail"]
    assert [str(number) for number in champions] == ["1", "2", "2"]
    assert len(client.search_model_versions("name = 'budgetdraft'")) == 2
    published = {path.name for path in (checkout / "report").rglob("*")}
    assert {"report.html", "summary.json", "figures"} <= published
