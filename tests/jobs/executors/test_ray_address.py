"""What is said before Ray is asked: of an address where nothing answers, of a folder too deep for sockets."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import jobs
from jobs import Terminated, was_terminated
from jobs.executors.ray_address import SOCKET_BYTES, TRIES, address_of, check_folder, check_ray, start_ray
from jobs.executors.ray_executor import RayExecutor
from pipeline.config.run import Run
from pipeline.errors import ConfigError
from tests.helpers.clock import patience
from tests.helpers.mlflow_server import free_port
from tests.helpers.tiny import tiny_config


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of Ray's variables, and a short folder."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_TMPDIR", TRIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")


@pytest.fixture
def listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, which pytest's own has not."""
    with TemporaryDirectory(prefix="bd", dir="/tmp") as folder:
        yield Path(folder)


class RayError(Exception):
    pass


def fake_ray(monkeypatch: pytest.MonkeyPatch, raised: BaseException | None = None) -> list[dict[str, Any]]:
    """Stands in for the module ray; returns the options that `init` is called with."""
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        asked.append(options)
        if raised:
            raise raised

    module: Any = SimpleNamespace(init=init, exceptions=SimpleNamespace(RayError=RayError))
    monkeypatch.setitem(sys.modules, "ray", module)
    return asked


@pytest.mark.parametrize(
    ("field", "variables", "expected"),
    [
        (None, {}, "local"),
        ("", {}, "local"),
        (None, {"RAY_ADDRESS": ""}, "local"),  # else Ray joins whatever runs on this machine
        (None, {"RAY_ADDRESS": "head:6379"}, None),
        (None, {"RAY_JOB_ID": "01"}, None),
        ("auto", {}, "auto"),
        ("head:6379", {"RAY_ADDRESS": "other:6379"}, "head:6379"),
    ],
)
def test_what_ray_is_given(
    monkeypatch: pytest.MonkeyPatch, field: str | None, variables: dict[str, str], expected: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert address_of(Run(ray_address=field)) == expected


@pytest.mark.parametrize("kind", ["{}", "ray://{}"])
@pytest.mark.parametrize("variable", [False, True])
def test_nothing_answers(monkeypatch: pytest.MonkeyPatch, kind: str, variable: bool) -> None:
    """Said at once, with what gave the address; `auto` stands for the variable where there is one."""
    given = kind.format(f"127.0.0.1:{free_port()}")
    name, fields = "run.ray_address", [given]
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", given)
        name, fields = "RAY_ADDRESS", ["", "auto"]
    for field in fields:
        executor = RayExecutor(tiny_config({"run.executor": "ray", "run.ray_address": field}))
        began = time.monotonic()
        with pytest.raises(ConfigError, match=f"{name} = {given}: nothing answers .*refused.*; set {name}"):
            _ = executor.ray
        assert time.monotonic() - began < patience(5)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "head", "head:", ":6379", "head:port", "head:٣", "ray://head", "x://h:1"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"run.ray_address = .*: this is no HOST:PORT; set run.ray_address"):
        check_ray(Run(ray_address=address))


@pytest.mark.parametrize("address", ["127.0.0.1:99999999", "a..b:6379"])
def test_what_cannot_be_connected_to(address: str) -> None:
    with pytest.raises(ConfigError, match=f"run.ray_address = {address}: nothing answers"):
        check_ray(Run(ray_address=address))


def test_something_else_answers(monkeypatch: pytest.MonkeyPatch, listener: str) -> None:
    """Ray is asked then, and tries once unless its user wants more."""
    asked = fake_ray(monkeypatch, ConnectionError("Failed to connect to Ray cluster\nmore"))
    with pytest.raises(ConfigError) as caught:
        start_ray(Run(ray_address=listener), logging_level=30)
    assert asked == [{"address": listener, "logging_level": 30}] and os.environ[TRIES] == "1"
    text = str(caught.value)
    assert text.startswith(f"run.ray_address = {listener}: Failed to connect to Ray cluster; see that")
    assert "RAY_AUTH_MODE" in text and "more" not in text
    monkeypatch.setenv(TRIES, "7")
    with pytest.raises(ConfigError):
        start_ray(Run(ray_address=listener))
    assert os.environ[TRIES] == "7"


@pytest.mark.parametrize("error", [RuntimeError("Version mismatch"), RayError("no token")])
def test_a_cluster_that_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, listener: str, error: Exception
) -> None:
    fake_ray(monkeypatch, error)
    monkeypatch.setenv("RAY_ADDRESS", listener)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS = {listener}: {error}; see that"):
        start_ray(Run())


def test_sigterm_while_ray_starts_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handler, which stands by then, ends the process with its own code."""
    monkeypatch.setattr(jobs, "_received", set())
    before = signal.getsignal(signal.SIGTERM)
    fake_ray(monkeypatch, SystemExit(1))
    try:
        with pytest.raises(Terminated):
            start_ray(Run())
        assert was_terminated()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_ray_that_cannot_start_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no token can be kept at home. How long it may take to start is not changed."""
    asked = fake_ray(monkeypatch, PermissionError(errno.EPERM, "Operation not permitted", "/nowhere/.ray"))
    with pytest.raises(
        ConfigError, match=r"in /tmp/ray: .*/nowhere/.ray.* see that it can write .*TMPDIR.*HOME"
    ):
        start_ray(Run())
    assert asked == [{"address": "local"}] and TRIES not in os.environ


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("", "needs an absolute path"),
        ("relative", "needs an absolute path"),
        ("{}/file", "/ray cannot be written .Not a directory"),
        ("{}/" + 70 * "n", "sockets there would have 1[0-9][0-9] bytes, and may have 107"),
        ("{}/" + 20 * "ä", "sockets there would have 1[0-9][0-9] bytes"),  # of two bytes each
    ],
)
def test_a_folder_that_ray_cannot_use(
    monkeypatch: pytest.MonkeyPatch, short: Path, name: str, folder: str, reason: str
) -> None:
    (short / "file").touch()
    monkeypatch.setenv(name, folder.format(short))
    with pytest.raises(ConfigError, match=f"^{name} = .*{reason}.*; set RAY_TMPDIR to a short") as caught:
        RayExecutor(tiny_config({"run.executor": "ray"})).room("prepare")
    assert len(str(caught.value)) < 800
    assert [path.name for path in short.iterdir()] == ["file"]


def bind(path: str) -> None:
    """Make a socket and remove it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
    os.unlink(path)


def test_a_socket_may_have_so_many_bytes_and_no_more(short: Path) -> None:
    """As the operating system has it."""
    path = f"{short}/{'s' * SOCKET_BYTES}"[:SOCKET_BYTES]
    bind(path)
    with pytest.raises(OSError, match="too long"):
        bind(path + "s")


def test_the_longest_folder_is_taken(monkeypatch: pytest.MonkeyPatch, short: Path) -> None:
    below = f"/ray/session_2026-01-31_12-00-00_123456_{os.getpid()}/sockets/dash_MetricsHead"
    longest = f"{short}/{'n' * SOCKET_BYTES}"[: SOCKET_BYTES - len(below)]
    monkeypatch.setenv("RAY_TMPDIR", longest)
    assert check_folder() == f"{longest}/ray"
    monkeypatch.setenv("RAY_TMPDIR", longest + "n")
    with pytest.raises(ConfigError, match=f"at most {len(longest)} bytes"):
        check_folder()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_has_no_longer_sockets_than_are_counted(local_ray: ModuleType) -> None:
    import ray._private.worker as worker

    folder = Path(worker._global_node.get_sockets_dir_path())
    longest = max(len(name) for name in os.listdir(folder))
    assert longest == len("dash_MetricsHead"), os.listdir(folder)
    counted = f"session_2026-01-31_12-00-00_123456_{os.getpid()}"
    assert len(folder.parent.name) == len(counted) and folder.name == "sockets"
