"""A target, drafters on disk and prompts, for tests of the stage sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.axes import Cell, Place
from pipeline.kv.views import view_of
from pipeline.metrics import Round
from pipeline.models.load import load_model
from pipeline.store.files import read_rows
from pipeline.store.rows import Continuation, Prompt, PromptRow
from pipeline.sweep.evaluator import Evaluator, MeasureTask, ReplayTask
from pipeline.sweep.grid import Drafter
from pipeline.sweep.picks import configured_picks
from pipeline.train.target.teacher import ContinueTask, Teacher
from tests.helpers.pairs import make_pair, rounds_of, tokens_of
from tests.helpers.tiny import VOCABULARY, save_model, tiny_config, write_prepare

CPU = torch.device("cpu")
PROMPTS, LENGTH, LIMIT = 4, 64, 16
SWEEP: dict[str, Any] = {
    "sweep.mode": "both",
    "sweep.policies": ["chunk_topk", "streaming"],
    "sweep.budgets": [16, 32, "full"],
    "sweep.gammas": [2, 5],
    "sweep.measure": {"budgets": [16, "full"], "prompts": 2, "repeats": 2, "predict": False},
}


class SweepBench:
    """Prompts, the target's continuations, and drafters on disk.

    Args:
        taught: changes of the config under which the continuations are written.
    """

    def __init__(
        self, folder: Path, models: dict[str, PreTrainedModel], taught: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.refs = {name: save_model(model, folder / name) for name, model in models.items()}
        self.prepare = write_prepare(folder / "prepare", tiny_config(), test_prompts=PROMPTS)
        (self.file,) = (self.prepare / "prompts").glob("test-*.jsonl")
        self.teach = folder / "teach"
        given = tiny_config(taught or {})
        teacher = Teacher(given, self.refs["target"], self.prepare / "tokenizer", self.teach, CPU)
        teacher(ContinueTask(self.file))
        self.pair = tuple(load_model(self.refs[name], VOCABULARY) for name in ("target", "drafter"))
        self.prompts = read_rows(self.file, Prompt)
        self.continuations = read_rows(self.teach / "continuations" / self.file.name, Continuation)

    def evaluator(
        self, drafters: Sequence[str] = ("drafter",), changes: dict[str, Any] | None = None
    ) -> Evaluator:
        chosen = [Drafter(name, self.refs[name], 128) for name in drafters]
        changes = SWEEP | (changes or {})
        changes["sweep.measure"] = {"predict": False, **changes["sweep.measure"]}
        config = tiny_config(changes)
        return Evaluator(config, self.refs["target"], chosen, self.prepare / "tokenizer", CPU)

    def replay_task(self, output: Path, first: int = 0, last: int = PROMPTS) -> ReplayTask:
        continuations = self.teach / "continuations" / self.file.name
        return ReplayTask(self.file, (continuations,), first, last, output / "rows" / f"replay-{first}.jsonl")

    def replayed(self, changes: dict[str, Any]) -> list[PromptRow]:
        """The rows of all prompts and of one drafter."""
        task = self.replay_task(self.folder / "replayed")
        assert self.evaluator(changes=changes)(task).failed == 0
        return read_rows(task.output, PromptRow)

    def measure_task(
        self, evaluator: Evaluator, output: Path, first: int = 0, last: int = PROMPTS
    ) -> MeasureTask:
        """Of the cells that the evaluator's config names."""
        drafters = [one.drafter for one in evaluator.contenders]
        place = Place(self.prompts[0].dataset, self.prompts[0].context)
        picks = configured_picks(evaluator.sweep, drafters, place)
        measure = evaluator.sweep.measure
        at = measure.temperatures or evaluator.sweep.temperatures
        file = output / "rows" / f"measure-{first}.jsonl"
        return MeasureTask(self.file, tuple(picks), measure.repeats, at, first, last, file)

    def measured(
        self,
        output: Path,
        drafters: Sequence[str] = ("drafter",),
        changes: dict[str, Any] | None = None,
        last: int = 2,
    ) -> MeasureTask:
        """Measure the first prompts; the task knows where its rows are."""
        evaluator = self.evaluator(drafters, changes)
        task = self.measure_task(evaluator, output, last=last)
        evaluator(task)
        return task

    def speculate(
        self, prompt: Prompt, read: Prompt, policy: str, budget: int | str, gamma: int
    ) -> tuple[list[int], list[Round]]:
        """One greedy cell by hand: the drafter holds a view of the prompt `read`."""
        tokens = [torch.tensor([prompt.tokens])], [torch.tensor([read.tokens])]
        pair = make_pair(*self.pair, tokens[0], view_of(policy, budget), LIMIT + gamma, read=tokens[1])
        rounds = rounds_of(pair, gamma, LIMIT)
        return tokens_of(pair, rounds)[0], rounds[0]


def key(row: PromptRow) -> tuple[str, Cell]:
    return row.prompt_id, row.cell
