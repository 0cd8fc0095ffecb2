"""kill -9 of the MLflow server while training and while the sweep is logged."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.clock import patience
from tests.helpers.fault_toy import Tally, Toy, log_of, missing, outcome, tail, wait_until
from tests.helpers.mlflow_server import MlflowServer, mirrored

AWAY_S = 3.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    with MlflowServer(folder) as server:
        yield server


def finished(server: MlflowServer, stage: str) -> int:
    """Runs of a kind that the server's database holds, read beside it."""
    file = server.database.removeprefix("sqlite:///")
    query = (
        "SELECT count(*) FROM tags JOIN runs USING (run_uuid) "
        "WHERE key = 'stage' AND value = ? AND status = 'FINISHED'"
    )
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=patience(30))) as database:
        return int(database.execute(query, (stage,)).fetchone()[0])


@pytest.mark.long
@pytest.mark.fault("kill -9 of the MLflow server while training logs, and again while the sweep does")
def test_nothing_is_lost_or_doubled(toy: Toy, server: MlflowServer, tmp_path: Path, tally: Tally) -> None:
    storage = tmp_path / "storage"
    uri = server.uri.replace("//", "//ann:pa55word@")
    tracked = ["tracking.enabled=true", f"tracking.uri={uri}"]
    process = toy.start(storage, *tracked, "tracking.experiment=broken")
    for stage, most in (("curves", 4), ("cell", 14)):
        wait_until(lambda stage=stage: finished(server, stage), process, f"a run of {stage}")  # type: ignore[misc]
        server.kill()
        there = finished(server, stage)
        assert 0 < there < most, f"it was killed too late to be a test: {there} runs of {stage}"
        time.sleep(AWAY_S)
        assert process.poll() is None
        server.start()
    assert process.wait(timeout=patience(180)) == 0, tail(storage)
    assert (
        "did not take" in log_of(storage).read_text() and "takes writes again" in log_of(storage).read_text()
    )

    # The same results are mirrored once more, undisturbed, and compared.
    assert toy.run(storage, *tracked, "tracking.experiment=clean") == 0, tail(storage)
    broken, clean = (mirrored(server.uri, name) for name in ("broken", "clean"))
    cells = [name for name in clean if name.startswith("minimal/sweep/") and " at " not in name]
    assert len(cells) == 2 * 7  # drafters × (three budgets, each with its control, and no prefix)
    tally.lost += missing(broken, clean) + missing(outcome(storage), toy.clean())
    assert tally.lost == 0
    made = [file for folder in (storage, server.folder) for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in [*made, log_of(storage)] if b"pa55word" in file.read_bytes()]
