"""docker/: what goes into the images, how servers start and stop, and all of them from packages."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.helpers.clock import patience
from tests.helpers.fault_toy import artifact, flat, make_toy
from tests.helpers.mlflow_server import free_port
from tests.helpers.paths import ROOT

DOCKER = ROOT / "docker"
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
PINNED = r":\d+\.\d+(\.\d+)?-\S+@sha256:[0-9a-f]{64}"
CLEAN_S, PIPELINES_S = 1500, 900
AXES = ("drafter", "dataset", "context", "policy", "budget", "control", "threshold", "temperature", "seed")


class Line(NamedTuple):
    stage: str
    instruction: str
    text: str


def dockerfile() -> list[Line]:
    """Its instructions, each with the name of its stage."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines, stage = [], ""
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        instruction, rest = line.split(maxsplit=1)
        if instruction == "FROM":
            stage = rest.split()[-1]
        lines.append(Line(stage, instruction, " ".join(rest.split())))
    return lines


def of(stage: str, instruction: str) -> list[str]:
    return [line.text for line in dockerfile() if line[:2] == (stage, instruction)]


# ── the images ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", ["mlflow", "budgetdraft"])
def test_an_image_runs_as_nobody_special_and_says_how_it_is(stage: str) -> None:
    assert of(stage, "FROM") == [f"base AS {stage}"] and of(stage, "USER") == ["1000"]
    after = [line.instruction for line in dockerfile() if line.stage == stage]
    assert "RUN" not in after[after.index("USER") :]
    assert len(of(stage, "HEALTHCHECK")) == 1


def test_foreign_images_are_pinned_by_digest() -> None:
    (base,) = of("base", "FROM")
    assert base.startswith("python:3.11.") and re.fullmatch(f"python{PINNED} AS base", base)
    foreign = {service["image"] for service in SERVICES.values()} - {"budgetdraft:${DEVICE:-gpu}"}
    engines = {SERVICES[name]["image"] for name in ("vllm", "vllm-cpu")}  # by release: test_compose.py
    assert foreign - {"budgetdraft-mlflow"} - engines == {SERVICES["postgres"]["image"]}
    assert re.fullmatch(f"postgres{PINNED}", SERVICES["postgres"]["image"])


def test_nothing_that_pip_is_told_stays_in_a_layer() -> None:
    installs = [
        line.text for line in dockerfile() if line.instruction == "RUN" and "pip install" in line.text
    ]
    assert len(installs) == 3
    assert all(text.startswith("--mount=type=secret,id=pip,target=/etc/pip.conf ") for text in installs)
    assert all("-c constraints.txt" in text for text in installs)
    assert [line.text for line in dockerfile() if line.instruction == "ARG"] == ["DEVICE=gpu"]


def test_the_builder_gets_what_is_copied_and_no_more() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignore if line.startswith("!")]
    assert ignore[1] == "*"
    copied = [name for line in dockerfile() if line.instruction == "COPY" for name in line.text.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied), copied
    assert all(any(Path(name).match(pattern) for pattern in allowed) for name in copied), copied
    assert not any(Path("docker/.env").match(pattern) for pattern in allowed)


def test_the_code_comes_after_what_it_needs() -> None:
    lines = [line.text for line in dockerfile() if line.stage == "budgetdraft"]
    install = next(i for i, text in enumerate(lines) if "requirements.txt" in text and "pip install" in text)
    assert lines.index("jobs jobs") > install and lines.index("pipeline pipeline") > install


def printed(device: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "docker/requirements.py", device]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(60))


def test_a_device_has_its_build_of_torch() -> None:
    pin = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin
    builds = (pin[1], f"{pin[1]}+cu130", f"{pin[1]}+cpu")
    for device, taken in (("cpu", [False, False, True]), ("gpu", [True, True, False])):
        *dependencies, torch = printed(device).stdout.splitlines()
        assert "mlflow>=3.10" in dependencies
        allowed = SpecifierSet(torch.removeprefix("torch")) & SpecifierSet(f"=={pin[1]}")
        assert [allowed.contains(build) for build in builds] == taken
    refused = printed("tpu")
    assert refused.returncode == 1 and "DEVICE=tpu: build with" in refused.stderr


def linted(*command: str) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed; ci.yml installs it")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    linted("hadolint", "docker/Dockerfile")


def test_shellcheck_finds_nothing() -> None:
    linted("shellcheck", *map(str, sorted(DOCKER.glob("*.sh"))))


# ── the start scripts ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment where `ray` and `mlflow` only print their arguments and the database's password."""
    for name in ("ray", "mlflow"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\necho "password $PGPASSWORD"\n')
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_HEAD": "head:7000"}


def started(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(60)
    )


def test_no_ray_node_starts_without_a_token(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    token = tmp_path / "token"
    for content in (None, "", "t0ken"):
        if content is not None:
            token.write_text(content)
        done = started("docker/ray-node.sh", "worker", "--x", **stand_ins, RAY_AUTH_TOKEN_PATH=str(token))
        assert done.returncode == (0 if content else 2), done.stderr
    assert done.stdout.splitlines()[0] == "start --address=head:7000 --block --x"
    done = started("docker/ray-node.sh", "head", **stand_ins, RAY_AUTH_TOKEN_PATH=str(token))
    assert done.stdout.splitlines()[0] == "start --head --port=7000 --block"


def test_no_mlflow_server_starts_without_a_password(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    password = tmp_path / "password"
    for exists in (False, True):
        if exists:
            password.touch()
        done = started("docker/mlflow-server.sh", **stand_ins, POSTGRES_PASSWORD_FILE=str(password))
        assert done.returncode == 2 and "set POSTGRES_PASSWORD" in done.stderr and not done.stdout


def test_the_password_of_the_database_is_no_argument(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    (tmp_path / "secret").write_text("s3:/@cret")
    done = started(
        "docker/mlflow-server.sh", "--port=1", **stand_ins, POSTGRES_PASSWORD_FILE=str(tmp_path / "secret")
    )
    assert done.stdout.splitlines() == ["server --serve-artifacts --port=1", "password s3:/@cret"]


def test_containers_and_packages_start_the_same_scripts() -> None:
    commands = [SERVICES[name]["command"][0] for name in ("mlflow", "ray-head", "ray-worker")]
    scripts = {Path(command).name for command in commands}
    assert scripts == set(re.findall(r"\$HERE/([\w-]+\.sh)", (DOCKER / "servers.sh").read_text()))
    assert all((DOCKER / name).stat().st_mode & stat.S_IXUSR for name in (*scripts, "servers.sh"))


def test_servers_are_kept_in_ones_own_folder_only(tmp_path: Path) -> None:
    """Somebody else's folder, and a link, which somebody else may have put there."""
    foreign = tmp_path / "foreign"
    if os.geteuid() == 0:
        foreign.mkdir()
        os.chown(foreign, 65534, 65534)
    else:
        foreign = Path("/")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    for folder in (foreign, link):
        before = sorted(folder.iterdir())
        for what in ("start", "stop"):
            done = started("docker/servers.sh", what, PATH=os.environ["PATH"], SERVERS=str(folder))
            assert done.returncode == 1 and f"SERVERS={folder} is no folder of yours" in done.stderr
        assert sorted(folder.iterdir()) == before


def test_stop_ends_servers_of_its_folder_only(tmp_path: Path) -> None:
    """A file with a process id stays where a machine goes down, and the id is given to another process."""
    # No children of the test: one that has ended would be there until it is waited for.
    commands = {"mlflow": "sleep 600", "ray1": f"tail -f {shlex.quote(str(tmp_path / 'log'))}"}
    (tmp_path / "log").touch()
    processes = {}
    try:
        for name, command in commands.items():
            own = started("sh", "-c", f"{command} > /dev/null 2>&1 & echo $!", PATH=os.environ["PATH"])
            (tmp_path / f"{name}.pid").write_text(own.stdout)
            processes[name] = psutil.Process(int(own.stdout))
        done = started("docker/servers.sh", "stop", PATH=os.environ["PATH"], SERVERS=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert {name: process.is_running() for name, process in processes.items()} == {
            "mlflow": True, "ray1": False,
        }  # fmt: skip
        assert not list(tmp_path.glob("*.pid"))
    finally:
        for process in processes.values():
            if process.is_running():
                process.kill()


# ── for real ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
@pytest.mark.timeout(patience(CLEAN_S + 60))
def test_the_install_steps_run_in_a_clean_environment(tmp_path: Path) -> None:
    """COPY and RUN of the CPU image, without a container; Debian's packages and users are left out."""
    folder, environment = tmp_path / "image", tmp_path / "python"
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=patience(120))
    variables = {**os.environ, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "DEVICE": "cpu"}
    for line in dockerfile():
        if line.stage == "mlflow":
            continue
        if line.instruction == "COPY":
            *sources, target = line.text.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
                into = folder / target / Path(source).name if target.endswith("/") else folder / target
                into.parent.mkdir(parents=True, exist_ok=True)
                copy(ROOT / source, into)
        elif line.instruction == "RUN" and "apt-get" not in line.text:
            script = re.sub(r"--mount=\S+ ", "", line.text)
            done = subprocess.run(
                ["sh", "-c", script],
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                timeout=patience(CLEAN_S),
            )
            assert done.returncode == 0, done.stderr[-3000:]
    for command in (
        ["budgetdraft", "--help"],
        ["budgetdraft", "doctor"],
        ["budgetdraft", "config", "conf/cluster.yaml"],
    ):
        done = subprocess.run(
            command, cwd=folder, env=variables, capture_output=True, text=True, timeout=patience(300)
        )
        assert done.returncode == 0, done.stdout + done.stderr
    asked = [environment / "bin" / "python", "-c", "import torch; print(torch.version.cuda)"]
    assert subprocess.run(asked, capture_output=True, text=True, timeout=patience(120)).stdout == "None\n"


@pytest.fixture
def servers() -> Iterator[tuple[Path, dict[str, str]]]:
    """`servers.sh start`: the folder of the servers, and what it says to source."""
    if not (shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))):
        pytest.skip("PostgreSQL's server is not installed")
    folder = Path(mkdtemp(prefix="bds"))  # not pytest's, which other users do not enter
    own = {**os.environ, "SERVERS": str(folder), "PYTHON": sys.executable, "PORTS": str(free_ports(12))}
    script = str(DOCKER / "servers.sh")
    try:
        done = subprocess.run(
            [script, "start"], env=own, capture_output=True, text=True, timeout=patience(300)
        )
        assert done.returncode == 0, done.stderr
        variables = dict(re.findall(r"(\w+)=(\S+)", Path(done.stdout.strip()).read_text()))
        yield folder, variables
    finally:
        subprocess.run([script, "stop"], env=own, check=True, timeout=patience(200))
        left = [p.info for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
        shutil.rmtree(folder)
    assert left == []


def free_ports(number: int) -> int:
    """The first of a row of ports that are free now."""
    taken = {connection.laddr.port for connection in psutil.net_connections("inet") if connection.laddr}
    first = free_port()
    while taken & set(range(first, first + number)):
        first -= number
    return first


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(patience(PIPELINES_S))
def test_pipelines_log_to_postgres_at_once(servers: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Two jobs on three nodes: what the database holds in the end is what their reports say, each once."""
    folder, variables = servers
    toy = make_toy(tmp_path)
    checkout = tmp_path / "checkout"
    for name in ("jobs", "pipeline", "kernels", "conf"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    values = yaml.safe_load(toy.config.read_text())
    values |= {"tracking": {"enabled": True, "uri": variables["MLFLOW_TRACKING_URI"]}}
    values["run"]["executor"] = "ray"
    (checkout / "toy.yaml").write_text(yaml.safe_dump(values))

    def pipeline(seed: int) -> subprocess.CompletedProcess[str]:
        own = (f"name=toy{seed}", f"seed={seed}", "--storage", str(tmp_path / f"runs{seed}"), "--wait")
        command = [sys.executable, "-m", "jobs", "submit", "toy.yaml", *own]
        environment = {**os.environ, **variables}
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor() as both:
        done = list(both.map(pipeline, (1, 2)))
    assert [one.returncode for one in done] == [0, 0], done[0].stdout[-3000:] + done[1].stdout[-3000:]
    for seed in (1, 2):
        report = artifact(tmp_path / f"runs{seed}", "report")
        assert report
        rows = [json.loads(line) for line in (report / "cells.jsonl").read_text().splitlines()]
        points = {tuple(str(flat(row)[axis]) for axis in AXES) for row in rows}
        assert len(points) < len(rows)  # a run of MLflow holds every γ
        assert stored(folder, variables, report.name.removeprefix("report-")) == {"FINISHED": len(points)}
    log = (folder / "mlflow.log").read_text()
    assert "Traceback" not in log and " 500 " not in log, log[-3000:]


def stored(folder: Path, variables: dict[str, str], sweep: str) -> dict[str, int]:
    """Status → number of runs of a sweep's points, asked of PostgreSQL itself."""
    query = (
        "select status, count(*) from runs join tags stage using (run_uuid) join tags sweep using (run_uuid) "
        "where (stage.key, stage.value, sweep.key, sweep.value) = "
        f"('stage', 'cell', 'sweep_id', '{sweep}') group by status"
    )
    port = re.search(r":(\d+)$", variables["MLFLOW_TRACKING_URI"])
    assert port
    environment = {
        **os.environ,
        "PGPASSWORD": (folder / "postgres_password").read_text(),
        "PGPORT": str(int(port[1]) - 1),
    }
    command = ["psql", "-h", "127.0.0.1", "-U", "mlflow", "-d", "mlflow", "-At", "-F", " ", "-c", query]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=patience(60)
    )
    return {status: int(number) for status, number in map(str.split, done.stdout.splitlines())}
