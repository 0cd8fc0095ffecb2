"""Training that ends where the validation loss stays flat, and keeps the weights of the lowest point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.observe.training import read_metrics
from pipeline.train.checkpoints import checkpoint_folder
from pipeline.train.loop import Schedule, fit
from pipeline.train.stopping import Stopped
from tests.helpers.training import Line, schedule_for, torch_engine


class Watched(Line):
    """Has a validation loss that was written down before, point by point."""

    def __init__(self, curve: Sequence[float]) -> None:
        super().__init__()
        self.curve = iter(curve)

    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        return {"validation/next_token": next(self.curve)}


def patient_schedule(patience: int | None) -> Schedule:
    """A point every 2 of 20 steps."""
    schedule = schedule_for(20, learning_rate=1e-2, validate_every=2, checkpoint_every=20)
    schedule.patience = patience
    return schedule


@pytest.mark.parametrize(
    ("curve", "patience", "best", "last"),
    [
        ((5, 4, 3, 3.5, 3.2, 9, 9), 2, 6, 10),  # two points in a row that are no better
        ((5, 4, 4, 4, 3, 3, 3, 3), 3, 10, 16),  # an equal one is no better; a better one starts anew
        ((5, 4, 3, 2, 1, 0.9, 0.8, 0.7, 0.6, 0.5), 2, 20, 20),  # never
        ((5, 1, 2, 3, 4, 5, 6, 7, 8, 9), None, 20, 20),  # not asked for: the last weights
    ],
)
def test_training_ends_where_validation_stays_flat(
    make_model: Any, tmp_path: Path, curve: Sequence[float], patience: int | None, best: int, last: int
) -> None:
    schedule = patient_schedule(patience)
    wanted = fit(torch_engine(make_model(), schedule), Watched(curve), schedule, tmp_path, "x")
    assert wanted == checkpoint_folder(tmp_path, best)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == last
    plain = patient_schedule(None)
    with nullcontext() if best == 20 else pytest.raises(Stopped):
        fit(torch_engine(make_model(), plain), Line(), plain, tmp_path / "plain", "x", stop_after(best))
    theirs = load_file(checkpoint_folder(tmp_path / "plain", best) / "weights.safetensors")
    ours = load_file(wanted / "weights.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stop_after(steps: int) -> Callable[[], bool]:
    """Asked after every step; the 20th is the last anyway."""
    count = iter(range(1, 21))
    return lambda: next(count) == steps


@pytest.mark.parametrize("stopped", [5, 8, 10])
def test_patience_resumed_is_uninterrupted(make_model: Any, tmp_path: Path, stopped: int) -> None:
    """Before the lowest point, between it and the end, and where training was about to end."""
    schedule, curve = patient_schedule(2), (5, 4, 3, 3.5, 3.2)
    with pytest.raises(Stopped):
        fit(
            torch_engine(make_model(), schedule), Watched(curve), schedule, tmp_path, "x", stop_after(stopped)
        )
    for _ in range(2):  # a run that was killed before its export ends where it had ended
        wanted = fit(
            torch_engine(make_model(), schedule), Watched(curve[stopped // 2 :]), schedule, tmp_path, "x"
        )
        assert wanted == checkpoint_folder(tmp_path, 6)
        assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 10
        stopped = 10


def test_a_best_point_without_its_checkpoint_does_not_count(make_model: Any, tmp_path: Path) -> None:
    """Step 6 has the lowest loss and is damaged; step 2, the best before, went when 6 was written."""
    schedule, curve = patient_schedule(3), (3, 4, 2, 5, 6)
    with pytest.raises(Stopped):
        fit(torch_engine(make_model(), schedule), Watched(curve[:3]), schedule, tmp_path, "x", stop_after(6))
    assert not checkpoint_folder(tmp_path, 2).exists()
    (checkpoint_folder(tmp_path, 6) / "weights.safetensors").write_bytes(b"torn")
    again = (4.5, 4.4, 4.3)
    wanted = fit(torch_engine(make_model(), schedule), Watched(again), schedule, tmp_path, "x")
    assert wanted == checkpoint_folder(tmp_path, 4), "of 4, 4.5, 4.4 and 4.3"
