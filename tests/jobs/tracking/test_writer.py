"""The thread that writes to MLflow: order, trying again, refusals, giving up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from jobs.tracking import writer as tracking_writer
from jobs.tracking.writer import Refused, Writer
from tests.helpers.clock import patience


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_writer, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(tracking_writer, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(tracking_writer, "SILENT_S", 0.01)


class Clock:
    """Stands in for the module `time` of the writer: it goes on where a write says so."""

    def __init__(self) -> None:
        self.now, self.read = 0.0, threading.Event()
        self.waits = threading.get_ident()

    def monotonic(self) -> float:
        if threading.get_ident() == self.waits:
            self.read.set()
        return self.now

    def spend(self, seconds: float) -> None:
        """What a write does, once it is waited for."""
        self.read.wait()
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tracking_writer, "time", clock)
    return clock


def failing(times: int, then: Callable[[], None]) -> Callable[[], None]:
    """Fails so often, then does it."""
    left = iter(range(times))

    def action() -> None:
        for number in left:
            raise ConnectionError(f"failure {number} at http://ann:pa55@host")
        then()

    return action


def test_order_is_kept_over_failures(caplog: pytest.LogCaptureFixture) -> None:
    writer, done = Writer(), list[int]()
    with caplog.at_level(logging.INFO):
        for number in range(20):
            writer.put(f"write {number}", failing(3 * (number % 5 == 0), lambda n=number: done.append(n)))  # type: ignore[misc]
        assert writer.finish(patience(10)) == 0
    assert done == list(range(20))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 4, "one for each write that failed, not for each failure"
    assert "write 5" in warnings[1] and "failure 0" in warnings[1]
    assert "pa55" not in caplog.text and "takes writes again" in caplog.text


def test_put_does_not_wait_for_the_store() -> None:
    """Nothing is answered until all are put."""
    writer, answered = Writer(), threading.Event()
    for number in range(1000):
        writer.put(f"write {number}", lambda: answered.wait() and None)
    assert writer.left == 1000
    answered.set()
    assert writer.finish(patience(10)) == 0


@pytest.mark.parametrize("error", [Refused("no run"), FileNotFoundError("gone")])
def test_what_is_refused_is_named_and_dropped(caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    writer, done = Writer(), list[str]()

    def refuse() -> None:
        raise error

    writer.put("the curves of x", refuse)
    writer.put("the next", lambda: done.append("next"))
    assert writer.finish(patience(10)) == 0 and done == ["next"]
    assert "refuses the curves of x" in caplog.text and str(error) in caplog.text


@pytest.mark.parametrize(
    ("code", "final"),
    [
        ("INVALID_PARAMETER_VALUE", True),
        ("RESOURCE_DOES_NOT_EXIST", True),
        ("BAD_REQUEST", True),
        ("ENDPOINT_NOT_FOUND", False),
        ("UNAUTHENTICATED", False),
        ("PERMISSION_DENIED", False),
        ("REQUEST_LIMIT_EXCEEDED", False),
        ("TEMPORARILY_UNAVAILABLE", False),
        ("INTERNAL_ERROR", False),
    ],
)
def test_which_answers_are_final(code: str, final: bool) -> None:
    from mlflow.exceptions import RestException

    assert tracking_writer.is_final(RestException({"error_code": code, "message": "no"})) is final


@pytest.mark.parametrize(("status", "final"), [(413, True), (429, False), (503, False)])
def test_which_answers_of_artifact_stores_are_final(status: int, final: bool) -> None:
    import requests

    response = requests.Response()
    response.status_code = status
    assert tracking_writer.is_final(requests.HTTPError("no", response=response)) is final


def test_giving_up_counts_from_the_last_success(clock: Clock) -> None:
    """Writes that take longer than the patience together, but not one by one, are all waited for."""
    writer = Writer()
    for _ in range(10):
        writer.put("slow", lambda: clock.spend(40))
    clock.read.clear()
    assert writer.finish(60) == 0 and clock.now == 400

    def never() -> None:
        clock.spend(40)
        raise ConnectionError("failure")

    writer, began = Writer(), clock.now
    for _ in range(3):
        writer.put("never", never)
    clock.read.clear()
    assert writer.finish(60) == 3
    assert clock.now >= began + 60 and "failure" in writer.problem


def test_an_interrupt_waits_in_all_and_drops_what_can_be_repeated(clock: Clock) -> None:
    writer, done, go = Writer(), list[str](), threading.Event()
    writer.put("first", lambda: go.wait() and None)
    for number in range(100):
        writer.put(f"point {number}", lambda: done.append("point"), repeatable=True)
    writer.put("the end", lambda: done.append("the end"))
    writer.drop_repeatable()
    go.set()
    assert writer.finish(10, 10) == 0 and done == ["the end"]

    # Writes are taken all the time; after three of them, 30 s, nobody waits for the rest.
    writer, over = Writer(), threading.Event()

    def slow() -> None:
        clock.spend(10)
        if clock.now >= 30:
            over.wait()

    for _ in range(100):
        writer.put("slow", slow)
    clock.read.clear()
    assert writer.finish(60, 25) == 98
    over.set()
