"""A Ray head as the docs start one, apart from every other Ray on this machine, ended with its children."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.clock import patience, wait_for
from tests.helpers.mlflow_server import free_port

PATIENCE_S = 90
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """`environment` is what a client needs beside its own: address and token."""

    address: str
    token: str
    environment: dict[str, str]

    def get(self, path: str) -> Any:
        """What the job server answers, asked without Ray's client."""
        request = urllib.request.Request(
            self.address + path, headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=patience(30)) as answer:
            return json.load(answer)

    def job(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/api/jobs/{job_id}")


@contextmanager
def ray_head(cpus: int = 4) -> Iterator[Head]:
    """Up when its dashboard asks for the token and knows of a node."""
    folder = Path(tempfile.mkdtemp(prefix="bd"))  # short: sockets lie in it
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    address = f"http://127.0.0.1:{free_port()}"
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_API_SERVER_ADDRESS": address,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    options = {
        "port": 0, "dashboard-host": "127.0.0.1", "dashboard-port": address.rpartition(":")[2],
        "ray-client-server-port": free_port(), "min-worker-port": 0, "max-worker-port": 0,
        "num-cpus": cpus, "object-store-memory": 100_000_000,
    }  # fmt: skip
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", "--block", *arguments],
            env={**inherited, **environment, "RAY_TMPDIR": str(folder)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        head = Head(address, token, environment)
        told = (folder / "log").read_text
        wait_for(lambda: status(address) == 401, "the dashboard answered", PATIENCE_S, process, told)
        nodes = lambda: head.get("/api/v0/nodes")["data"]["result"]["total"]  # noqa: E731
        wait_for(nodes, "a node was known", PATIENCE_S, process, told)
        yield head
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def status(address: str) -> int:
    """The status of an answer without a token; 0 where nobody answers."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=patience(5)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def end(process: subprocess.Popen[bytes]) -> None:
    """Some of a head's children have sessions of their own."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=patience(20))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(family, timeout=patience(5))[1]:
        child.kill()
