"""The training loop, over any engine. One loop serves pretraining and drafter training.

A run's folder holds `metrics.jsonl` (a row per logged step), `checkpoints/` (see `checkpoints.py`),
`memory.json` and, at the end, the exported `model/`. Batches are functions of (seed, step), so resuming from
a checkpoint repeats exactly what an uninterrupted run does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.models import Pretrain
from pipeline.config.train import Train
from pipeline.errors import NotFinite
from pipeline.hardware import peak_bytes
from pipeline.models.export import export_model
from pipeline.observe.progress import progress
from pipeline.observe.training import read_metrics
from pipeline.store.files import write_json, write_text
from pipeline.store.layout import MEMORY, METRICS, MODEL
from pipeline.train.checkpoints import (
    checkpoint_folder,
    disk_errors,
    latest,
    load_weights,
    resume,
    save,
    step_of,
)
from pipeline.train.engine import Engine
from pipeline.train.stopping import Stopped, signals_put_off

LOG_EVERY = 10  # steps between rows of metrics.jsonl
WATCHED = "validation/next_token"  # the loss that `patience` watches
NORM = "norm"  # of the gradient, beside the losses of a step
OUTSIDE = "outside"  # beside them too: the share of labels outside a draft vocabulary
NAMED_MICROS = 12  # micro-batches that an error names


class Objective(Protocol):
    """What is minimised, and what is watched meanwhile."""

    tokens_per_micro: int

    def loss(self, model: PreTrainedModel, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of micro-batch `micro` of a step, and its terms for the log."""
        ...

    def name_batch(self, step: int, micro: int) -> str:
        """Which sequences micro-batch `micro` of a step has: files and rows."""
        ...

    def validate(self, model: PreTrainedModel) -> dict[str, float]:
        """Points of the validation curves."""
        ...


class Schedule:
    """The numbers that drive one run of the loop."""

    def __init__(self, group: Train | Pretrain, train: Train, steps: int) -> None:
        self.steps = steps
        self.learning_rate, self.warmup_steps = group.learning_rate, group.warmup_steps
        self.weight_decay = group.weight_decay
        self.clip = train.clip
        self.micro_batches = group.batch_sequences // train.micro_batch_sequences
        self.checkpoint_every, self.validate_every = train.checkpoint_every, train.validate_every
        self.patience = group.patience if isinstance(group, Pretrain) else None

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def fit(
    engine: Engine,
    objective: Objective,
    schedule: Schedule,
    folder: Path,
    name: str,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """Train up to `schedule.steps`, from the last good checkpoint in `folder` if there is one.

    Args:
        stop: asked on rank 0 after every step: whether to write a checkpoint and leave. By default Ctrl-C and
            SIGTERM are put off until a step is done, and act after the checkpoint.

    Returns:
        The checkpoint whose weights are wanted: the last, or with `schedule.patience` that of the lowest
        validation loss.

    Raises:
        NotFinite: if a loss or gradient norm is NaN or infinite; the text names the step, the sequences of
            its batch and the last good checkpoint.
        Stopped: after the checkpoint that `stop` asked for.
    """
    resumed = resume(engine, folder)
    start = resumed.step
    log = MetricsLog(folder / METRICS, start) if engine.rank == 0 else None
    curve = Curve(schedule.patience, log.rows if log else [], folder)
    mine = range(engine.rank, schedule.micro_batches, engine.world_size)
    window = Window(engine, resumed.unlogged)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    since, timed = time.perf_counter(), 0
    bar = progress(schedule.steps, f"train {name}", start) if engine.rank == 0 else _silent()
    with signals_put_off() if stop is None else nullcontext(stop) as asked, bar:
        for step in range(start, schedule.steps):
            # Asked at the beginning: a run that was killed before its export ends here too.
            if engine.share(int(curve.flat)):
                break
            sums: dict[str, Tensor] = {}
            for micro in mine:
                with engine.autocast():
                    loss, terms = objective.loss(engine.model, step, micro)
                engine.backward(loss)
                for term, value in terms.items():
                    sums[term] = sums.get(term, 0) + value.detach() / len(mine)
            window.add(sums, engine.step(schedule.rate(step)))
            bar.update(1)
            timed += 1
            done, last = step + 1, step + 1 == schedule.steps
            stopped = bool(engine.share(int(engine.rank == 0 and asked())))
            validated = done % schedule.validate_every == 0 or last
            checkpoint = (
                done % schedule.checkpoint_every == 0 or last or (validated and schedule.patience is not None)
            )
            logged = done % LOG_EVERY == 0 or checkpoint
            if logged or stopped:  # before every checkpoint, which must be a good one
                steps = window.fetch()
                check_finite(steps, done, objective, schedule, folder, name)
            row: dict[str, float] = {}
            if logged:
                seconds = max(time.perf_counter() - since, 1e-9)
                row = window.row()
                row["train/learning_rate"] = schedule.rate(step)
                row["train/tokens_per_s"] = (
                    timed * schedule.micro_batches * objective.tokens_per_micro / seconds
                )
            if validated:
                row |= objective.validate(engine.model)
            if row and log:
                log.write(done, row)
                curve.add(done, row)
            if checkpoint or stopped:
                save(engine, folder, done, window.steps, curve.best)
                write_memory(engine, folder)
            if stopped and not last:
                raise Stopped(
                    f"training {name} was asked to stop and did after step {done} of {schedule.steps}"
                )
            if row:
                since, timed = time.perf_counter(), 0
    newest = latest(folder)
    assert newest is not None, "the loop ends with a checkpoint"
    return checkpoint_folder(folder, engine.share(curve.best or step_of(newest)))


class Curve:
    """The validation losses so far by step, where `patience` may end training; on rank 0 alone.

    Args:
        rows: what `metrics.jsonl` in `folder` holds already.
    """

    def __init__(self, patience: int | None, rows: Sequence[dict[str, float]], folder: Path) -> None:
        self.patience = patience
        self.losses: dict[int, float] = {}
        for row in rows:
            self.add(int(row["step"]), row)
        # Where a damaged checkpoint is removed, the best one before it may be gone already.
        while self.best and not checkpoint_folder(folder, self.best).exists():
            del self.losses[self.best]

    def add(self, step: int, row: dict[str, float]) -> None:
        if self.patience is not None and WATCHED in row:
            self.losses[step] = row[WATCHED]

    @property
    def best(self) -> int:
        """The step of the lowest loss, the first of equal ones; 0 where there is none."""
        return min(self.losses, key=self.losses.__getitem__, default=0)

    @property
    def flat(self) -> bool:
        """Whether `patience` points in a row were no better than one before them."""
        later = [step for step in self.losses if step > self.best]
        return self.patience is not None and len(later) >= self.patience


class Window:
    """Losses and gradient norm of each step since the last row; on the device until someone asks."""

    def __init__(self, engine: Engine, steps: list[dict[str, float]]) -> None:
        self.engine, self.steps = engine, steps  # on the host, first step first
        self.names: list[str] = []
        self.waiting: list[Tensor] = []

    def add(self, losses: dict[str, Tensor], norm: Tensor | float) -> None:
        self.names = [*losses, NORM]
        values = [*losses.values(), torch.as_tensor(norm, device=self.engine.device)]
        self.waiting.append(torch.stack([value.float() for value in values]))

    def fetch(self) -> list[dict[str, float]]:
        """All steps, averaged over the workers."""
        if self.waiting:
            rows = self.engine.mean(torch.stack(self.waiting)).tolist()
            self.steps += [dict(zip(self.names, row, strict=True)) for row in rows]
            self.waiting = []
        return self.steps

    def row(self) -> dict[str, float]:
        """The mean losses and the last norm of the fetched steps, which then are forgotten."""
        steps, self.steps = self.steps, []
        means = {term: sum(step[term] for step in steps) / len(steps) for term in steps[0] if term != NORM}
        row = {f"{'train' if term == OUTSIDE else 'loss'}/{term}": mean for term, mean in means.items()}
        return row | {"train/grad_norm": steps[-1][NORM]}


def check_finite(
    steps: list[dict[str, float]],
    done: int,
    objective: Objective,
    schedule: Schedule,
    folder: Path,
    name: str,
) -> None:
    """Raise NotFinite for the first of the steps up to `done` that is not finite."""
    for number, values in enumerate(steps, done - len(steps) + 1):
        if all(map(math.isfinite, values.values())):
            continue
        terms = ", ".join(f"{term} {value:g}" for term, value in values.items())
        shown = range(min(schedule.micro_batches, NAMED_MICROS))
        batch = [f"  micro-batch {micro}: {objective.name_batch(number - 1, micro)}" for micro in shown]
        if schedule.micro_batches > NAMED_MICROS:
            batch.append(f"  … and {schedule.micro_batches - NAMED_MICROS} more")
        raise NotFinite(
            "\n".join(
                [
                    f"training {name}: step {number} is the first that is not finite ({terms}); it read",
                    *batch,
                    f"last good checkpoint: {latest(folder) or 'none'}; lower the learning rate, or look at "
                    "these sequences",
                ]
            )
        )


def write_memory(engine: Engine, folder: Path) -> None:
    """`memory.json`: the most bytes that each rank has held, of the GPU or, on a CPU, of the process."""
    cuda = engine.device.type == "cuda"
    ranks = engine.gather(torch.cuda.max_memory_allocated(engine.device) if cuda else peak_bytes())
    if engine.rank == 0:
        write_json(folder / MEMORY, {"device": engine.device.type, "ranks": ranks})


class _silent:
    """Stands in for the progress bar on all ranks but the first."""

    def __enter__(self) -> _silent:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def update(self, count: int) -> None:
        return None


class MetricsLog:
    """Appends rows to `metrics.jsonl`; rows after the step that a run resumes from are dropped first."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self.rows = [row for row in read_metrics(path) if row["step"] <= start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, step: int, row: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")


def export(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, checkpoint: Path, card: str
) -> None:
    """Write the weights of a checkpoint as `model/`, a Hugging Face folder with its card.

    Args:
        model: any model of the right shape on the CPU; it receives the weights.
    """
    load_weights(model, checkpoint)
    write_model(model, tokenizer, folder, card)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str) -> None:
    """Write `model/` whole or not at all."""
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(temporary):
        export_model(model, tokenizer, temporary)
    write_text(temporary / "README.md", card)
    for file in temporary.iterdir():  # the checkpoints are removed next
        with file.open("rb") as written:
            os.fsync(written.fileno())
    shutil.rmtree(folder / MODEL, ignore_errors=True)
    temporary.rename(folder / MODEL)
