"""MLflow behind HTTP: lost answers, a server that goes and comes back, one that stays away, and passwords."""

from __future__ import annotations

import itertools
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from jobs.tracking import tracker as tracker_module
from jobs.tracking import writer
from jobs.tracking.tracker import Tracker
from pipeline.config.schema import Config
from pipeline.errors import Incomplete
from tests.helpers.configs import MINIMAL
from tests.helpers.mlflow_server import MlflowServer, Proxy, mirrored
from tests.helpers.tracking import cell, planted, write_rows

STEPS = range(10, 60, 10)
ROWS = [cell(drafter=name, gamma=gamma) for name in ("a", "b", "c") for gamma in (2, 4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def proxy(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(writer, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(writer, "LONGEST_PAUSE_S", 0.5)
    proxy = Proxy(server.port)
    yield proxy
    proxy.stop()


Start = Callable[..., Tracker]


@pytest.fixture
def start(tmp_path: Path, proxy: Proxy, request: pytest.FixtureRequest) -> Start:
    def start(experiment: str = request.node.name, uri: str = proxy.uri, **changes: Any) -> Tracker:
        group = {"uri": uri.replace("//", "//ann:pa55word@"), "experiment": experiment, **changes}
        return Tracker.start(Config.model_validate(MINIMAL | {"storage": str(tmp_path), "tracking": group}))

    return start


def work(tracker: Tracker, folder: Path) -> None:
    """What a pipeline tells: two trained models with curves and weights, a sweep, files."""
    files = {name: folder / f"drafter-{name}-1/metrics.jsonl" for name in ("a", "b")}
    with tracker.stage_run("train") as train, tracker.follow(train, files, "drafters"):
        for name, file in files.items():
            write_rows(file, [{"step": step, "loss/total": len(name) / step} for step in STEPS])
            (file.parent / "model").mkdir(exist_ok=True)
            (file.parent / "model/weights").write_text(name)
    tracker.log_models(train, files, "drafters")
    with tracker.stage_run("sweep") as sweep:
        tracker.log_sweep(sweep, "made up", ROWS)
        tracker.log_files(sweep, [files["a"]])


def clean(start: Start, server: MlflowServer, folder: Path) -> dict[str, object]:
    with start("clean", server.uri) as tracker:
        work(tracker, folder)
    pieces = mirrored(server.uri, "clean")
    assert len([name for name in pieces if " at " not in name]) == 1 + 2 + 2 + 3
    assert pieces["minimal/train/a loss/total at 20"] == 1 / 20
    status, _, _, files = pieces["minimal/train"]  # type: ignore[misc]
    assert (status, files) == ("FINISHED", ["drafters/a/weights", "drafters/b/weights"])
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("clean")
    assert experiment is not None
    client.rename_experiment(experiment.experiment_id, f"clean {time.time_ns()}")
    return pieces


@pytest.mark.parametrize("action", ["lose", "refuse"])
def test_writes_fail_often(
    start: Start, proxy: Proxy, server: MlflowServer, tmp_path: Path, action: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The server does what it is asked and the answer is lost, or it does not; four requests of ten."""
    expected = clean(start, server, tmp_path)
    chance = random.Random(1)
    name = f"often {action}"
    with caplog.at_level(logging.INFO), start(name) as tracker:
        proxy.behave = lambda method, path: action if chance.random() < 0.4 else "pass"
        work(tracker, tmp_path)
    assert sum(seen[2] == action for seen in proxy.seen) > 15
    assert mirrored(server.uri, name) == expected
    assert "did not take" in caplog.text
    assert "pa55word" not in caplog.text + " ".join(tracker.links())
    assert not planted(tmp_path, server.folder)


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back(
    start: Start,
    server: MlflowServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = clean(start, server, tmp_path)
    asking, request = set[str](), requests.Session.request

    def asked(*arguments: Any, **options: Any) -> requests.Response:
        asking.add(threading.current_thread().name)
        return request(*arguments, **options)

    with start("back") as tracker:
        server.kill()
        with monkeypatch.context() as patch:
            patch.setattr(requests.Session, "request", asked)
            work(tracker, tmp_path)
        assert tracker.writer.left > 10
        assert asking <= {"mlflow"}, "who works asks nothing of a server that may be away"
        server.start()
    assert mirrored(server.uri, "back") == expected
    assert "pa55word" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("writes", [1, 5, 9, 13, 22])
def test_giving_up_and_the_same_command_again(
    start: Start, proxy: Proxy, server: MlflowServer, tmp_path: Path, writes: int
) -> None:
    """The server goes away for good after so many requests. A second run adds what is missing, once."""
    from mlflow import MlflowClient

    expected = clean(start, server, tmp_path)
    name, turn = f"again {writes}", itertools.count()
    with (
        pytest.raises(Incomplete, match="the same command logs what is missing"),
        start(name, wait_s=0.5) as t,
    ):
        proxy.behave = lambda method, path: "pass" if next(turn) < writes else "refuse"
        work(t, tmp_path)
    proxy.behave = lambda method, path: "pass"
    with start(name) as tracker:
        work(tracker, tmp_path)

    client = MlflowClient(server.uri)
    runs = client.search_runs([tracker.store.experiment_id], max_results=1000)
    pieces = [run for run in runs if run.data.tags["stage"] in ("curves", "cell")]
    assert sorted(str(run.info.run_name) for run in pieces) == sorted(
        name.rpartition("/")[2] for name in expected if name.count("/") >= 2 and " at " not in name
    )
    assert {run.info.status for run in pieces} == {"FINISHED"}
    for run in pieces:
        where = "train" if run.data.tags["stage"] == "curves" else "sweep"
        for metric in run.data.metrics:
            points = {p.step: p.value for p in client.get_metric_history(run.info.run_id, metric)}
            wanted = {
                int(name.rpartition(" ")[2]): value
                for name, value in expected.items()
                if name.startswith(f"minimal/{where}/{run.info.run_name} {metric} at ")
            }
            assert points == wanted != {}
    weights = [
        file.path
        for run in runs if run.info.run_name == "train"
        for name in ("a", "b")
        for file in client.list_artifacts(run.info.run_id, f"drafters/{name}")
    ]  # fmt: skip
    assert set(weights) == {"drafters/a/weights", "drafters/b/weights"}


def test_the_bodys_own_error_wins(start: Start, proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="its own"), start(wait_s=0.3):
        proxy.behave = lambda method, path: "refuse"
        raise ValueError("its own")
    assert "writes are not in MLflow" in caplog.text


def test_ctrl_c_waits_for_a_moment_only(start: Start, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[tuple[float, ...]] = []
    finish = writer.Writer.finish

    def told(self: writer.Writer, *given: float) -> int:
        limits.append(given)
        return finish(self, *given)

    monkeypatch.setattr(writer.Writer, "finish", told)
    monkeypatch.setattr(tracker_module, "INTERRUPTED_S", 0.3)
    with pytest.raises(KeyboardInterrupt), start():
        proxy.behave = lambda method, path: "refuse"
        raise KeyboardInterrupt
    assert limits == [(0.3, 0.3)], "instead of tracking.wait_s: without a write that is taken, and in all"


def test_the_config_that_mlflow_keeps_has_no_password(start: Start, server: MlflowServer) -> None:
    with start() as tracker:
        pass
    kept = [file.read_text() for file in (server.folder / "served").rglob("config.yaml")]
    assert any("://***@127.0.0.1" in text for text in kept) and not planted(server.folder)
    assert json.dumps(tracker.links()).count("pa55word") == 0
