"""A tiny pipeline as real processes, and everything that it made in a form that can be compared."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from jobs.records.record import RECORDS
from tests.helpers.clock import patience, wait_for
from tests.helpers.configs import MINIMAL
from tests.helpers.documents import story
from tests.helpers.paths import ROOT

# What differs between two clean runs: clocks, and files that tell about them.
CLOCKED = ("train/tokens_per_s", "train/peak_memory_bytes")
PATIENCE_S = 180


def make_toy(folder: Path) -> Toy:
    """Writes the corpus and the config. Several shards, label tasks and replay tasks, two drafters."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(30):
        (corpus / f"tale{number:02d}.txt").write_text(story(number))
    values = copy.deepcopy(MINIMAL)
    source = {"kind": "text", "name": "tales", "files": ["*.txt"], "validation_fraction": 0.1}
    values["data"] |= {
        "root": str(corpus), "sources": [{**source, "test_fraction": 0.3}], "prompts": 16,
        "prompts_per_document": 2, "max_sequences": 48,
    }  # fmt: skip
    values["labels"] = {"sequences_per_shard": 8, "batch_sequences": 4}
    values["train"] |= {
        "steps": 12, "learning_rate": 3e-3, "checkpoint_every": 4, "validation_budgets": [16, "full"],
    }  # fmt: skip
    for role in ("target", "drafter"):
        values[role] = {**values[role], "pretrain": {"steps": 12, "batch_sequences": 4}}
    values["report"] = {"bootstrap_samples": 100}
    values["run"] |= {"cpus_per_task": 0.5}
    config = folder / "toy.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return Toy(folder, config)


@dataclass
class Toy:
    """One config; storages are given to each run."""

    folder: Path
    config: Path
    _clean: dict[str, dict[str, Any]] = field(default_factory=dict)

    def start(
        self, storage: Path, *overrides: str, executor: str = "inline", stage: str = "run", **environment: str
    ) -> subprocess.Popen[str]:
        """Start the command line on a storage; its output goes to `log_of(storage)`."""
        command = [sys.executable, "-m", "jobs", stage, str(self.config), f"storage={storage}"]
        with log_of(storage).open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*command, f"run.executor={executor}", *overrides],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def run(
        self, storage: Path, *overrides: str, executor: str = "inline", stage: str = "run", **environment: str
    ) -> int:
        """The exit code of a whole run."""
        process = self.start(storage, *overrides, executor=executor, stage=stage, **environment)
        return process.wait(timeout=patience(2 * PATIENCE_S))

    def clean(self, *overrides: str, executor: str = "inline") -> dict[str, Any]:
        """What a run without faults gives; made once for each way to run."""
        key = repr((executor, overrides))
        if key not in self._clean:
            storage = self.folder / f"clean-{len(self._clean)}"
            code = self.run(storage, *overrides, executor=executor)
            assert code == 0, tail(storage)
            self._clean[key] = outcome(storage)
        return self._clean[key]


def log_of(storage: Path) -> Path:
    """Beside the storage, so that nothing in there is not the pipeline's."""
    storage.parent.mkdir(parents=True, exist_ok=True)
    return storage.with_name(f"{storage.name}.log")


def tail(storage: Path, lines: int = 40) -> str:
    return "\n".join(log_of(storage).read_text(encoding="utf-8").splitlines()[-lines:])


def wait_until(ready: Callable[[], Any], process: subprocess.Popen[str], what: str) -> Any:
    """The first truthy value of `ready()`. Fails if the process ends or patience does."""
    return wait_for(ready, what, PATIENCE_S, process)


def artifact(storage: Path, stage: str) -> Path | None:
    """The folder of a stage, complete or not; None before it is there."""
    found = [folder for folder in storage.glob(f"{stage}-*") if folder.name.rpartition("-")[0] == stage]
    assert len(found) < 2, found
    return found[0] if found else None


def outcome(storage: Path) -> dict[str, Any]:
    """Everything a finished run made, by a name for each piece: hashes, losses, rows, table cells."""
    pieces: dict[str, Any] = {}
    reports = sorted(storage.glob("report-*/manifest.json"), key=lambda file: file.stat().st_mtime)
    for folder in sorted(storage.glob("*-*/")):
        stage = folder.name.rpartition("-")[0]
        if stage == "report" and folder != reports[-1].parent:
            continue  # of a run that ended with failures
        if folder.name == RECORDS:
            continue
        if not (folder / "manifest.json").exists():
            pieces[f"{folder.name} is not complete"] = True
            continue
        for file in sorted(folder.rglob("*")):
            name = f"{folder.name}/{file.relative_to(folder)}"
            if file.is_dir() or "checkpoints" in file.parts or file.name.startswith("."):
                continue
            if file.name == "metrics.jsonl":
                for row in map(json.loads, file.read_text().splitlines()):
                    piece = f"{name} step {row['step']}"
                    assert piece not in pieces, f"{piece} was counted twice"
                    pieces[piece] = {k: v for k, v in row.items() if k not in CLOCKED}
            elif file.suffix == ".safetensors":
                pieces[name] = {weight: float(value.norm()) for weight, value in load_file(file).items()}
            elif stage == "report" and file.name == "cells.jsonl":
                for row in map(json.loads, file.read_text().splitlines()):
                    piece = f"{name} cell {[flat(row)[k] for k in CELL_KEY if k != 'prompt_id']}"
                    assert piece not in pieces, f"{piece} was counted twice"
                    pieces[piece] = row["acceptance"]["mean"]
            elif stage == "sweep" and file.suffix == ".jsonl" and file.parent.name == "rows":
                for row in map(flat, map(json.loads, file.read_text().splitlines())):
                    cell = [row[k] for k in CELL_KEY]
                    piece = f"{folder.name} row {cell}"
                    assert piece not in pieces, f"{piece} was counted twice"
                    pieces[piece] = {k: v for k, v in row.items() if not k.endswith(("_s", "_bytes"))}
            elif stage in ("prepare", "teach") and file.suffix in (".npy", ".jsonl"):
                pieces[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return pieces


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """What a row and its parts hold, side by side."""
    told: dict[str, Any] = {}
    for name, value in row.items():
        told |= flat(value) if isinstance(value, dict) else {name: value}
    return told


CELL_KEY = (
    "mode", "drafter", "dataset", "context", "policy", "budget", "control", "gamma", "threshold",
    "temperature", "seed", "prompt_id",
)  # fmt: skip


def missing(found: dict[str, Any], expected: dict[str, Any]) -> int:
    """How many pieces are absent, too many, or not what they should be."""
    names = found.keys() | expected.keys()
    return sum(not same(found.get(name), expected.get(name)) for name in names)


def check_whole(tally: Tally, storage: Path, expected: dict[str, Any]) -> None:
    """The end of a fault's test: the storage holds what a run without it makes, nothing lost or doubled."""
    tally.lost += missing(outcome(storage), expected)
    assert tally.lost == 0


def same(ours: Any, theirs: Any) -> bool:
    """Equal, numbers up to the rounding of another engine or number of workers."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-3, abs_tol=1e-5)
    return bool(ours == theirs)


@dataclass
class Tally:
    """What one try lost."""

    lost: int = 0
