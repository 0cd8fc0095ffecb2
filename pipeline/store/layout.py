"""The stages by name, and the names of the files and folders that each of them writes into its artifact.

`MANIFEST` is written last into every artifact. A row file is named in `stages/sweep_phases.py`, the files
of a label shard in `train/target/teacher.py`, a checkpoint in `train/checkpoints.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

StageName = Literal["prepare", "pretrain", "teach", "train", "sweep", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)  # in the order in which they run
IMPROVE: Literal["improve"] = "improve"  # follows stage train, where it is asked for
Until = StageName | Literal["improve"]
MANIFEST = "manifest.json"

# prepare
TOKENIZER, DOCUMENTS, SEQUENCES, PROMPTS, PIECES = "tokenizer", "documents", "sequences", "prompts", ".pieces"
ASKED = "asked"  # prompts of the training split, which the target answers

# pretrain and train
MODEL, METRICS, MEMORY = "model", "metrics.jsonl", "memory.json"

# teach
LABELS, CONTINUATIONS, SHARES = "labels", "continuations", "shares"

# improve
SERVED_ROUNDS = "rounds.jsonl"  # of a shard of labels; and of the whole, a row a round of improving

# sweep
SIZES = "models.jsonl"
ROWS, FAILED, STEPS, STEPS_BESIDE = "rows", "failed", "steps", "steps_beside"
PREDICTED, PICKS = "predicted.jsonl", "picks.jsonl"
# A run-off picks one of the fastest cells, and the fresh repeats behind it say how fast this cell is.
MEASURED_AGAIN = ("run_off", "rechecked")

# report
CELLS, ANALYSIS, FIGURES = "cells.jsonl", "analysis.json", "figures"
RUN_OFF, AGAIN = "run_off.jsonl", "again.jsonl"
SUMMARY, PAGE = "summary.json", "report.html"


def stages_until(until: Until) -> tuple[Until, ...]:
    """The stages that run, up to and including this one."""
    if until == IMPROVE:
        return (*stages_until("train"), IMPROVE)
    return STAGES[: STAGES.index(until) + 1]


def shares_file(teach: Path, prompt_id: str) -> Path:
    """Of a test prompt: what the target attends to along its continuation, where views are chosen again."""
    return teach / SHARES / f"{prompt_id.replace('/', '-')}.npy"
