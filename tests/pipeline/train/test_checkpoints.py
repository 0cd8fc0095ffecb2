"""Checkpoints: what they hold, how many stay, and what happens to damaged and half-written ones."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pipeline.observe.training import read_metrics
from pipeline.train.checkpoints import checkpoint_folder, complete, disk_errors
from pipeline.train.engine import MOMENTS, PARTS
from pipeline.train.loop import fit
from tests.helpers.training import Line, schedule_for, torch_engine


def run(model: PreTrainedModel, folder: Path, steps: int = 12, **train: Any) -> PreTrainedModel:
    schedule = schedule_for(steps, learning_rate=1e-2, warmup_steps=2, **{"checkpoint_every": 4, **train})
    fit(torch_engine(model, schedule), Line(), schedule, folder, "x")
    return model


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss/line"]) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture
def expected(make_model: Any, tmp_path: Path) -> list[tuple[float, float]]:
    run(make_model(), tmp_path / "expected")
    return losses(tmp_path / "expected")


def test_the_files_are_adamws_state(make_model: Any, tmp_path: Path) -> None:
    """Against a plain loop with torch's own AdamW."""
    run(make_model(), tmp_path, steps=8)
    assert [path.name for path in complete(tmp_path)] == ["step-000004", "step-000008"]
    schedule, plain = schedule_for(8, learning_rate=1e-2, warmup_steps=2), make_model()
    optimizer = torch.optim.AdamW(plain.parameters(), weight_decay=schedule.weight_decay, fused=True)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        Line().loss(plain, step, 0)[0].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
    folder = checkpoint_folder(tmp_path, 8)
    states = {part: load_file(folder / f"{part}.safetensors") for part in PARTS}
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(states["weights"][name], weight.detach(), msg=name)
        for moment in MOMENTS:
            torch.testing.assert_close(states[moment][name], optimizer.state[weight][moment], msg=name)
    marker = json.loads((folder / "complete.json").read_text())
    assert marker["step"] == 8 == int(optimizer.state[next(plain.parameters())]["step"])
    for name, facts in marker["files"].items():
        content = (folder / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert {file.name for file in folder.iterdir()} == {*marker["files"], "complete.json"}


def test_the_newest_two_stay_and_half_written_ones_go(make_model: Any, tmp_path: Path) -> None:
    torn = checkpoint_folder(tmp_path, 8)
    torn.mkdir(parents=True)
    (torn / "weights.safetensors").write_bytes(b"torn")
    checkpoint_folder(tmp_path, 3).mkdir()
    run(make_model(), tmp_path, steps=16)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-000012", "step-000016"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


def mend_step(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": 12', '"step": 11'))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("weights.safetensors", flip),
        ("exp_avg.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-1])),
        ("exp_avg_sq.safetensors", Path.unlink),
        ("complete.json", lambda file: file.write_text('{"step": 12, "unl')),
        ("complete.json", mend_step),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    make_model: Any,
    tmp_path: Path,
    expected: list[tuple[float, float]],
    caplog: pytest.LogCaptureFixture,
    name: str,
    harm: Callable[[Path], object],
) -> None:
    run(make_model(), tmp_path / "x")
    file = checkpoint_folder(tmp_path / "x", 12) / name
    harm(file)
    trained = run(make_model(), tmp_path / "x")
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert str(file) in told.getMessage() and "removed" in told.getMessage()
    assert losses(tmp_path / "x") == expected
    whole = run(make_model(), tmp_path / "again")
    assert all(map(torch.equal, trained.parameters(), whole.parameters()))


def test_without_a_good_checkpoint_training_begins_anew(
    make_model: Any,
    tmp_path: Path,
    expected: list[tuple[float, float]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(make_model(), tmp_path / "x")
    for step in (8, 12):
        flip(checkpoint_folder(tmp_path / "x", step) / "exp_avg.safetensors")
    run(make_model(), tmp_path / "x")
    assert [record.levelname for record in caplog.records].count("ERROR") == 2
    assert losses(tmp_path / "x") == expected


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Writes beyond it fail, as on a full disk, with an errno of their own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_is_removed(
    make_model: Any, tmp_path: Path, expected: list[tuple[float, float]]
) -> None:
    run(make_model(), tmp_path / "x", steps=4)  # the first third, with another schedule
    size = (checkpoint_folder(tmp_path / "x", 4) / "weights.safetensors").stat().st_size
    folder = tmp_path / "y"
    with files_at_most(size - 1), pytest.raises(OSError) as told:
        run(make_model(), folder)
    assert told.value.errno == errno.EFBIG and "weights.safetensors" in str(told.value.filename)
    assert list((folder / "checkpoints").iterdir()) == []
    run(make_model(), folder)
    assert losses(folder) == expected


def test_a_full_disk_is_an_oserror() -> None:
    """safetensors says it in words; the text is what its Rust makes of ENOSPC."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError) as told, disk_errors(Path("weights.safetensors")):
        raise SafetensorError(text)
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError), disk_errors(Path("x")):
        raise SafetensorError("Error while deserializing header: incomplete metadata")
