"""Metrics files that are followed while they grow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from pipeline.observe import logs, training
from pipeline.observe.events import Event, Training, listening
from tests.helpers.clock import wait_for


def test_all_who_listen_hear_of_growing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "POLL_S", 0.05)
    files = {name: tmp_path / f"drafter-{name}-0/metrics.jsonl" for name in ("a", "b")}
    for file in files.values():
        file.parent.mkdir()
    heard: list[tuple[str, list[tuple[int, bool]], str | None]] = []
    by_another: list[str] = []

    def listen(stage: str, event: Event) -> None:
        assert isinstance(event, Training)
        current = event.current.name if event.current else None
        heard.append((stage, [(len(model.rows), model.done) for model in event.models], current))

    def hear(what: tuple[str, list[tuple[int, bool]], str | None]) -> None:
        wait_for(lambda: heard[-1] == what, f"that {what} is heard", told=lambda: str(heard[-3:]))

    rows = [json.dumps({"step": step}) + "\n" for step in (10, 20)]
    with (
        logs.at(logs.WorkItem(stage="train")),
        listening(listen),
        listening(lambda stage, event: by_another.append(stage)),
    ):
        with training.follow(files):
            assert heard == [("train", [(0, False), (0, False)], "a")], "before anything is trained"
            files["a"].write_text("".join(rows) + '{"step": 3')
            hear(("train", [(2, False), (0, False)], "a"))
            files["a"].write_text(rows[0] + "\0\0\0\n" + rows[1])  # as another machine sees a write
            time.sleep(0.2)
            (files["a"].parent / "model").mkdir()
            files["a"].write_text(rows[0])
            hear(("train", [(1, True), (0, False)], "b"))
            files["b"].write_text("".join(rows))
            (files["b"].parent / "model").mkdir()
        assert heard[-1] == ("train", [(1, True), (2, True)], None), "what is there at the end"
        told = len(heard)
        time.sleep(0.2)
    assert len(heard) == told == len(by_another), "nothing is told once the body is left"
