"""The script for a GPU that is there for minutes: all of it at toy size, and what fails in it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_quick
from benchmarks.gpu_quick import PARTS, RESULT, Outcome, start_part
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

BLOCKED = ("ray", "deepspeed", "mlflow", "datasets", "pydantic", "typer", "matplotlib", "pyarrow", "pytest")


@pytest.mark.long
def test_the_whole_script_at_toy_size_on_a_bare_machine(tmp_path: Path) -> None:
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    (tmp_path / "sitecustomize.py").write_text(f"import sys\n{block}\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu_quick", "--toy", "--minutes", str(patience(300) / 60)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    told = json.loads((tmp_path / "out" / RESULT).read_text())
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert [(part["part"], part["state"]) for part in told["parts"]] == [(name, "done") for name in PARTS]
    assert {one["part"] for one in told["rows"]} == set(PARTS) and told["toy"]
    assert told["versions"]["torch"] and told["commit"] and "gpu_quick --minutes" in told["command"]
    names = {one["row"] for one in told["rows"]}
    for kernel in ("verify_attention", "chunk_select", "kl and its gradients", "accept"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert f"GPU {kernel}, {dtype}: worst error ÷ tolerance" in names
    for place in ("4K", "8K", "16K"):
        assert f"GPU speculation ÷ our graphed AR, {place}, γ = 5" in names
    (of_16,) = (one for one in told["rows"] if one["row"].startswith("GPU speculation ÷ AR, 16 prompts"))
    rates = [float(rate) for rate in of_16["note"].removeprefix("accepted ").split(", ")]
    assert len(rates) == 16 and len(set(rates)) > 4  # each row accepts by itself


@pytest.mark.slow
def test_a_part_that_fails_or_takes_too_long_says_so(tmp_path: Path) -> None:
    given = argparse.Namespace(out=tmp_path, toy=True)
    failed = start_part("of no name", given, patience(60))
    assert failed.state == "failed with 2" and "of no name" in failed.said
    assert start_part("the card", given, 0.2).state == "out of its 0 s"


def test_what_was_not_come_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts go on after one that fails, and none begins when the time is over."""
    clock = iter(range(0, 1000, 35))
    monkeypatch.setattr(gpu_quick.time, "monotonic", lambda: float(next(clock)))
    begun: list[str] = []

    def start(name: str, given: argparse.Namespace, limit_s: float) -> Outcome:
        begun.append(name)
        assert limit_s <= PARTS[name].limit_s
        return Outcome(name, "failed with 1", 1.0, "what it said")

    monkeypatch.setattr(gpu_quick, "start_part", start)
    command = ["gpu_quick", "--toy", "--minutes", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_quick.main() == 1
    parts = json.loads((tmp_path / RESULT).read_text())["parts"]
    assert [part["part"] for part in parts] == list(PARTS)
    assert [part["state"] for part in parts[: len(begun)]] == ["failed with 1"] * len(begun)
    assert {part["state"] for part in parts[len(begun) :]} == {"not begun"}
    assert 1 < len(begun) < len(PARTS) and "the time is over" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_quick.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_quick", "--out", str(tmp_path / "none")])
    assert gpu_quick.main() == 2
    assert "no GPU" in capsys.readouterr().err and not (tmp_path / "none").exists()
