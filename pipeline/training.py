"""The training loop, over any engine. One loop serves pretraining and drafter training.

A run's folder holds `metrics.jsonl` (a row per logged step), `checkpoints/step-N/` and, at the end, the
exported `model/`. Batches are functions of (seed, step), so resuming from a checkpoint repeats exactly what
an uninterrupted run does.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.artifacts import write_json, write_text
from pipeline.config import Pretrain, Train
from pipeline.decoding import NotFinite
from pipeline.engine import Engine
from pipeline.errors import BadData
from pipeline.models import export_model
from pipeline.progress import progress

LOG_EVERY = 10  # steps between rows of metrics.jsonl
METRICS = "metrics.jsonl"
COMPLETE = "complete.json"  # marks a checkpoint that is whole


class Objective(Protocol):
    """What is minimised, and what is watched meanwhile."""

    tokens_per_micro: int

    def loss(self, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of micro-batch `micro` of a step, and its terms for the log."""
        ...

    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        """Points of the validation curves."""
        ...


class Plan:
    """The numbers that drive one run of the loop."""

    def __init__(self, group: Train | Pretrain, train: Train, steps: int) -> None:
        self.steps = steps
        self.learning_rate, self.warmup_steps = group.learning_rate, group.warmup_steps
        self.weight_decay = group.weight_decay
        self.clip = train.clip
        self.micro_batches = group.batch_sequences // train.micro_batch_sequences
        self.checkpoint_every, self.validate_every = train.checkpoint_every, train.validate_every

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fit(engine: Engine, objective: Objective, plan: Plan, folder: Path, name: str) -> None:
    """Train up to `plan.steps`, from the last complete checkpoint in `folder` if there is one.

    Raises:
        NotFinite: if a loss or gradient norm is NaN or infinite; the text names the steps and the last
            good checkpoint.
    """
    start = resume(engine, folder)
    log = MetricsLog(folder / METRICS, start) if engine.rank == 0 else None
    mine = range(engine.rank, plan.micro_batches, engine.world_size)
    sums: dict[str, Tensor] = {}
    since, logged = time.perf_counter(), start
    with progress(plan.steps, f"train {name}", start) if engine.rank == 0 else _silent() as bar:
        for step in range(start, plan.steps):
            for micro in mine:
                with engine.autocast():
                    loss, terms = objective.loss(engine.model, step, micro)
                engine.backward(loss)
                for term, value in terms.items():
                    sums[term] = sums.get(term, 0) + value.detach()
            norm = engine.step(plan.rate(step))
            bar.update(1)
            done, last = step + 1, step + 1 == plan.steps
            checkpoint = done % plan.checkpoint_every == 0 or last
            row: dict[str, float] = {}
            # Also before every checkpoint: it must be a good one, and a resumed run averages from there on.
            if done % LOG_EVERY == 0 or checkpoint:
                micros = (done - logged) * len(mine)
                row = {f"loss/{term}": float(engine.mean(value)) / micros for term, value in sums.items()}
                row["train/learning_rate"], row["train/grad_norm"] = plan.rate(step), float(norm)
                seconds = time.perf_counter() - since
                row["train/tokens_per_s"] = (
                    micros * engine.world_size * objective.tokens_per_micro / max(seconds, 1e-9)
                )
                if not all(map(math.isfinite, row.values())):
                    good = latest(folder)
                    raise NotFinite(
                        f"training {name}: not finite between steps {logged} and {done}: {row}; "
                        f"last good checkpoint: {good or 'none'}"
                    )
                sums, logged = {}, done
            if done % plan.validate_every == 0 or last:
                row |= objective.validate(engine.model)
            if row and log:
                log.write(done, row)
            if checkpoint:
                save(engine, folder, done)
            if row:
                since = time.perf_counter()


class _silent:
    """Stands in for the progress bar on all ranks but the first."""

    def __enter__(self) -> _silent:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, count: int) -> None:
        return None


class MetricsLog:
    """Appends rows to `metrics.jsonl`; rows behind the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        rows = read_metrics(path)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start))

    def write(self, step: int, row: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a torn last line, left by a kill, is ignored."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = sorted(marker.parent for marker in folder.glob(f"checkpoints/step-*/{COMPLETE}"))
    return complete[-1] if complete else None


def save(engine: Engine, folder: Path, step: int) -> None:
    """Write a checkpoint; it counts once its marker is there. Older ones go."""
    target = checkpoint_folder(folder, step)
    engine.save(target)
    if engine.rank == 0:
        write_json(target / COMPLETE, {"step": step, "written_by": identity(engine)})
        for old in folder.glob("checkpoints/step-*"):
            if old != target:
                shutil.rmtree(old)


def resume(engine: Engine, folder: Path) -> int:
    """Load the newest complete checkpoint; returns the number of finished steps.

    Raises:
        BadData: if another kind or number of workers wrote it.
    """
    newest = latest(folder)
    if newest is None:
        return 0
    state = json.loads((newest / COMPLETE).read_text(encoding="utf-8"))
    if state["written_by"] != identity(engine):
        raise BadData(
            f"{newest} was written by {state['written_by']}, and this run trains with {identity(engine)}: "
            f"use the executor, train.num_workers and train.deepspeed it began with, or delete "
            f"{folder} to begin anew"
        )
    engine.load(newest)
    return int(state["step"])


def identity(engine: Engine) -> str:
    """What a checkpoint's files depend on."""
    return f"{engine.name} × {engine.world_size}"


def export(
    engine: Engine, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str
) -> None:
    """Write the trained weights as `model/`, a Hugging Face folder with its card. Rank 0 only.

    Args:
        model: any model of the right shape on the CPU; it receives the weights.
    """
    newest = latest(folder)
    assert newest is not None, "the loop ends with a checkpoint"
    model.load_state_dict(engine.state_dict(newest))
    write_model(model, tokenizer, folder, card)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write `model/` whole or not at all."""
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    export_model(model, tokenizer, temporary)
    write_text(temporary / "README.md", card)
    shutil.rmtree(folder / "model", ignore_errors=True)
    temporary.rename(folder / "model")
