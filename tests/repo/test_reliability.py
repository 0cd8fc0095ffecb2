"""The page about reliability is what the committed files of measurements give."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.faults.conftest import Counter
from tests.helpers import reliability
from tests.helpers.reliability import FAULTS, PAGE, SOAK, page, read
from tests.soak.pipelines import Soak


def test_the_page_is_the_measurements() -> None:
    assert page(read(FAULTS), read(SOAK)) == PAGE.read_text(encoding="utf-8")


def test_what_was_not_as_expected_is_on_the_page() -> None:
    soak = Soak(seed=7, minutes=2, provenance={"cpu": "a CPU"}, pipelines=2, whole=1, lost=3)
    soak.unexpected = ["soak-2: exit code 1 after ['kill -9 of a node']"]
    soak.driver_bytes, soak.driver_files = [2**20, 9 * 2**20, 2**21], [5, 100, 6]
    told = page(None, asdict(soak))
    assert "exit code 1 after" in told and "SEED=7" in told
    assert "| pieces lost, doubled or different | 3 |" in told
    assert "last third of starts | 1 and 2 MiB |" in told and "last third of starts | 5 and 6 |" in told
    assert not soak.good


def report(line: int, fault: str | None, outcome: Any, lost: int = 0) -> pytest.TestReport:
    properties = [] if fault is None else [("fault", fault), ("lost", lost)]
    return pytest.TestReport(
        "tests/faults/test_x.py::test", ("tests/faults/test_x.py", line, "test"), {}, outcome, None, "call",
        user_properties=properties,
    )  # fmt: skip


def test_reports_of_several_processes_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the tests, whichever was done first; what was skipped has not been tried."""
    monkeypatch.setattr(reliability, "FAULTS", tmp_path / "faults.json")
    monkeypatch.setattr(reliability, "PAGE", tmp_path / "page.md")
    counter = Counter(SimpleNamespace(getoption={"faults_page": True}.__getitem__))  # type: ignore[arg-type]
    counter.pytest_sessionfinish()
    assert not reliability.FAULTS.exists(), "without a fault there is nothing to write"
    for told in (
        report(9, "b", "passed"), report(2, "a", "failed", 3), report(2, "a", "passed"),
        report(2, "a", "skipped"), report(5, None, "failed"),
    ):  # fmt: skip
        counter.pytest_runtest_logreport(told)
    counter.pytest_sessionfinish()
    assert json.loads(reliability.FAULTS.read_text()) == [
        {"fault": "a", "tries": 2, "survived": 1, "lost": 3},
        {"fault": "b", "tries": 1, "survived": 1, "lost": 0},
    ]
    assert "| a | 2 | 1 | 3 |" in reliability.PAGE.read_text()
    # A run of some faults alone leaves the lines of the others.
    again = Counter(counter.config)
    for told in (report(9, "b", "passed"), report(9, "b", "passed"), report(12, "c", "skipped")):
        again.pytest_runtest_logreport(told)
    again.pytest_sessionfinish()
    lines = {line["fault"]: line["tries"] for line in json.loads(reliability.FAULTS.read_text())}
    assert lines == {"a": 2, "b": 2}
