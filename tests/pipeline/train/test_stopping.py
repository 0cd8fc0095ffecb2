"""Ctrl-C and SIGTERM while training: a checkpoint of the last finished step, the same losses afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from jobs import Terminated, raise_on_sigterm
from pipeline.train.checkpoints import latest
from pipeline.train.loop import fit
from pipeline.train.objectives import MultiView
from pipeline.train.stopping import SIGNALS, Stopped, signals_put_off
from tests.helpers.tiny import Workshop, losses, weights
from tests.helpers.training import Line, schedule_for, torch_engine


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The command line's, as long as the test runs."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    raise_on_sigterm()
    # A shell that starts the tests in the background has them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "kind", "at"),
    [
        (signal.SIGINT, KeyboardInterrupt, 2),
        (signal.SIGTERM, Terminated, 6),
        (signal.SIGTERM, Terminated, 11),
    ],
)
def test_a_signal_ends_with_a_checkpoint_of_the_step(
    workshop: Workshop,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[BaseException],
    at: int,
) -> None:
    """In the middle of step `at`, between rows, between checkpoints (every 5), and in the last step."""
    whole = MultiView.loss

    def signalled(self: MultiView, model: PreTrainedModel, step: int, micro: int) -> Any:
        if step == at and micro == 1:
            os.kill(os.getpid(), number)
        return whole(self, model, step, micro)

    with monkeypatch.context() as patch, pytest.raises(BaseException) as told:
        patch.setattr(MultiView, "loss", signalled)
        workshop.train(f"signalled-{at}")
    assert type(told.value) is kind
    folder = workshop.folder / f"signalled-{at}" / "multi_view"
    kept = latest(folder)
    assert kept is not None and kept.name == f"step-{at + 1:06d}"
    assert not (folder / "model").exists()
    workshop.train(f"signalled-{at}")
    assert losses(folder) == losses(uninterrupted), "no row more, none less, bit for bit"
    ours, theirs = weights(folder), weights(uninterrupted)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_whoever_asks_is_heard_after_each_step(make_model: Any, tmp_path: Path) -> None:
    """The way of Ray's workers: a question instead of signals."""
    schedule = schedule_for(12, checkpoint_every=5)
    answers = iter([False, False, True])
    with pytest.raises(Stopped, match="training x was asked to stop and did after step 3 of 12"):
        fit(torch_engine(make_model(), schedule), Line(), schedule, tmp_path, "x", lambda: next(answers))
    kept = latest(tmp_path)
    assert kept is not None and kept.name == "step-000003"


def test_the_second_signal_does_not_wait() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), signals_put_off() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(asked())
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("behind the second")
    assert reached == [True]


def test_nothing_happens_without_a_signal() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with signals_put_off() as asked:
        assert not asked()
    assert [signal.getsignal(number) for number in SIGNALS] == before
