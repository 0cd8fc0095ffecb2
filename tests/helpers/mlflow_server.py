"""A real `mlflow server` that can be killed and started again, and a proxy before it that misbehaves."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests.helpers.clock import patience, wait_for

UP_S = 120  # a server takes 10 s and more to start on two slow cores


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`mlflow server` on 127.0.0.1, its database and its log in one folder; as a context it is up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{folder}/server.db"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        with ExitStack() as unless_up:
            unless_up.callback(self.kill)
            self.start()
            unless_up.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", self.database, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "served")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, **quiet},
                start_new_session=True,
            )
        wait_for(self.answers, "the server answered", UP_S, self.process, self.log)

    def answers(self) -> bool:
        with suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{self.uri}/health", timeout=patience(5)).close()
            return True
        return False

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def log(self) -> str:
        return (self.folder / "server.log").read_text()[-3000:]


class Proxy:
    """Passes requests on to a server, as `behave` says: "pass", "lose" the answer, "refuse" to pass it on,
    or answer with a status, such as "413".

    `seen` lists (method, path, what was done).
    """

    def __init__(self, port: int) -> None:
        self.behave: Callable[[str, str], str] = lambda method, path: "pass"
        self.seen: list[tuple[str, str, str]] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                proxy.handle(self, port)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, request: BaseHTTPRequestHandler, port: int) -> None:
        path = request.path.partition("?")[0]
        action = self.behave(request.command, path)
        self.seen.append((request.command, path, action))
        request.close_connection = True
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if action == "refuse":
            request.send_error(503)
            return
        if action.isdecimal():
            request.send_error(int(action))
            return
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
        server = http.client.HTTPConnection("127.0.0.1", port, timeout=patience(60))
        server.request(request.command, request.path, body, headers)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        if action == "lose":
            return
        request.send_response(answer.status)
        request.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def mirrored(uri: str, experiment: str) -> dict[str, object]:
    """All that MLflow holds of an experiment, by a name for each piece that two experiments share.

    Runs by their path of names, with status, parameters, tags and artifacts; each metric point.
    """
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = {r.info.run_id: r for r in client.search_runs([found.experiment_id], max_results=5000)}

    def path(run_id: str) -> str:
        run = runs[run_id]
        parent = run.data.tags.get("mlflow.parentRunId")
        return f"{path(parent)}/{run.info.run_name}" if parent else str(run.info.run_name)

    def files(run_id: str, folder: str | None = None) -> list[str]:
        listed = client.list_artifacts(run_id, folder)
        return [name for f in listed for name in (files(run_id, f.path) if f.is_dir else [f.path])]

    pieces: dict[str, object] = {}
    for run_id, run in runs.items():
        name = path(run_id)
        assert name not in pieces, f"{name} is there twice"
        tags = {k: v for k, v in run.data.tags.items() if k not in OWN_TAGS}
        pieces[name] = (run.info.status, run.data.params, tags, sorted(files(run_id)))
        for metric in run.data.metrics:
            for point in client.get_metric_history(run_id, metric):
                piece = f"{name} {metric} at {point.step}"
                assert piece not in pieces, f"{piece} is there twice"
                pieces[piece] = point.value
    return pieces


# These differ between two mirrors.
OWN_TAGS = ("write_id", "record", "mlflow.parentRunId", "mlflow.artifactLocation")
