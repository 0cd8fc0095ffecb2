"""Stage sweep: all cells of a prompt, one typed row each.

A task is a slice of the prompts of one (data set, context). Replay needs the drafters only: a drafter reads
a prompt once, that gives all views of it, and one more forward gives the acceptance of every budget and γ.
Measuring also loads the target, reads the task's prompts once with it, and times autoregressive decoding and
every measured cell in turn (`trial.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from kernels import dispatch
from pipeline import replay
from pipeline.artifacts import read_rows, write_rows
from pipeline.cells import (
    CELL_ERRORS,
    Drafter,
    DraftLength,
    Mode,
    chosen_drafter,
    make_cell,
    make_failure,
    make_row,
    view_cells,
)
from pipeline.config import Config
from pipeline.decoding import NotFinite
from pipeline.kv import PrefixView, View
from pipeline.lean import DecodeModel, decode_model
from pipeline.measure import Bench, Chance, Sides
from pipeline.models import ModelRef, load_model, stop_tokens
from pipeline.rows import Continuation, FailedCell, Prompt, PromptRow
from pipeline.trial import Trial

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepTask:
    """Prompts [first, last) of one file, replayed or measured; `output` gets the rows."""

    mode: Mode
    prompts: Path
    continuations: Path
    first: int
    last: int
    output: Path

    @property
    def failures(self) -> Path:
        return self.output.parent.parent / "failed" / self.output.name


class Evaluator:
    """The models, loaded once per worker; a call does one task and returns (rows, failures)."""

    def __init__(
        self,
        config: Config,
        target: ModelRef,
        drafters: Sequence[Drafter],
        tokenizer: Path,
        device: torch.device,
    ) -> None:
        self.config, self.sweep, self.device, self.target_ref = config, config.sweep, device, target
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        dispatch.choose(config.run.kernels)
        self.drafters = [(drafter, *self.load(drafter.ref)) for drafter in drafters]
        self.target: tuple[PreTrainedModel, DecodeModel] | None = None
        self.sides = Sides(config.decode.compile)
        self.warm: set[tuple[object, ...]] = set()

    def load(self, ref: ModelRef) -> tuple[PreTrainedModel, DecodeModel]:
        """A model twice over the same memory: its modules, which replay, and what decodes."""
        model = load_model(ref, len(self.tokenizer), self.device)
        return model, decode_model(model, self.config.decode.prefill_chunk)

    def __call__(self, task: SweepTask) -> tuple[int, int]:
        """Do a task unless its rows are there; failed cells are written apart and tried again next time."""
        if task.output.exists() and not task.failures.exists():
            return len(read_rows(task.output, PromptRow)), 0
        prompts = read_rows(task.prompts, Prompt)
        continuations = read_rows(task.continuations, Continuation)
        run = self.replay if task.mode == "replay" else self.measure
        rows: list[PromptRow] = []
        failed: list[FailedCell] = []
        for row in run(prompts, continuations, range(task.first, task.last)):
            if isinstance(row, PromptRow):
                rows.append(row)
            else:
                failed.append(row)
        if failed:
            write_rows(task.failures, failed)
        write_rows(task.output, rows)
        if not failed:
            task.failures.unlink(missing_ok=True)
        return len(rows), len(failed)

    # ── replay ────────────────────────────────────────────────────────────────────────────────────

    def replay(
        self, prompts: list[Prompt], continuations: list[Continuation], mine: range
    ) -> Iterator[PromptRow | FailedCell]:
        """Greedy acceptance of every drafter, view, control and γ on these prompts."""
        for drafter, model, fast in self.drafters:
            views = PromptViews(fast, prompts, [cell.view for cell in view_cells(self.sweep)])
            for index in mine:
                try:
                    yield from self.replay_prompt(drafter, model, prompts[index], continuations[index], views)
                except CELL_ERRORS as error:
                    yield make_failure("replay", self.sweep, drafter, prompts[index], error)

    def replay_prompt(
        self,
        drafter: Drafter,
        model: PreTrainedModel,
        prompt: Prompt,
        continuation: Continuation,
        views: PromptViews,
    ) -> Iterator[PromptRow | FailedCell]:
        if len(continuation.tokens) < 2:
            return  # the prefill's token ended the text: there is nothing to draft
        cells, own, partner = view_cells(self.sweep), views.of(prompt), views.partner(prompt)
        if partner is None:  # one document only: the other cells do not depend on it
            log.warning("no other document for %s: its control other_prompt is left out", prompt.prompt_id)
            cells = [cell for cell in cells if cell.control != "other_prompt"]
        other = own if partner is None else views.of(partner)
        kept = [(other if cell.control == "other_prompt" else own)[cell.view] for cell in cells]
        matches, finite = replay.match_views(model, kept, continuation.tokens)
        greedy = Chance(0.0, self.sweep.seeds[0])
        for cell, view, match, good in zip(cells, kept, matches.tolist(), finite.tolist(), strict=True):
            if not good:
                error = NotFinite("logits not finite in replay")
                yield make_failure("replay", self.sweep, drafter, prompt, error, cell)
                continue
            for gamma in self.sweep.gammas:
                rounds = replay.rounds(match, gamma, prompt.max_new_tokens, continuation.eos_at is not None)
                yield make_row(
                    "replay",
                    make_cell(drafter, prompt, cell, DraftLength(gamma), greedy),
                    drafter,
                    prompt,
                    replay.count(rounds, gamma),
                    continuation.tokens,
                    view,
                    self.sweep.looping_rate,
                )

    # ── measure ───────────────────────────────────────────────────────────────────────────────────

    def measure(
        self, prompts: list[Prompt], continuations: list[Continuation], mine: range
    ) -> Iterator[PromptRow | FailedCell]:
        """Wall clock of the measured cells against autoregressive decoding."""
        if self.target is None:
            self.target = self.load(self.target_ref)
        together = self.sweep.measure.prompts_together
        for at in range(mine.start, mine.stop, together):
            yield from self.measure_batch(prompts[at : min(at + together, mine.stop)], *self.target)

    def measure_batch(
        self, batch: list[Prompt], target: PreTrainedModel, fast_target: DecodeModel
    ) -> Iterator[PromptRow | FailedCell]:
        bench: Bench | None = None
        for drafter, _, fast in self.drafters:
            if not chosen_drafter(drafter.name, self.sweep.measure.drafters):
                continue
            try:
                bench = bench or Bench(self.sides, fast_target, batch, max(self.sweep.gammas))
                eos = stop_tokens(target)
                trial = Trial(self.sweep, bench, drafter, fast, eos, self.tokenizer, self.warm)
                yield from list(trial.rows())
            except CELL_ERRORS as error:
                yield from (make_failure("measure", self.sweep, drafter, prompt, error) for prompt in batch)


class PromptViews:
    """A drafter's views of the prompts of one file, read when needed; the last two prompts are remembered."""

    def __init__(self, model: DecodeModel, prompts: list[Prompt], views: Sequence[View]) -> None:
        self.model, self.prompts, self.views = model, prompts, list(dict.fromkeys(views))
        self.recent: dict[str, dict[View, PrefixView]] = {}

    def of(self, prompt: Prompt) -> dict[View, PrefixView]:
        if prompt.prompt_id not in self.recent:
            while len(self.recent) > 1:
                self.recent.pop(next(iter(self.recent)))
            tokens_1S = torch.tensor([prompt.tokens], device=self.model.geometry.device)
            kept, _ = self.model.prefill(tokens_1S, [(len(prompt.tokens), view) for view in self.views])
            self.recent[prompt.prompt_id] = dict(zip(self.views, kept, strict=True))
        return self.recent[prompt.prompt_id]

    def partner(self, prompt: Prompt) -> Prompt | None:
        """The next prompt of the file that has the same length and comes from another document, if any."""
        at = next(i for i, other in enumerate(self.prompts) if other.prompt_id == prompt.prompt_id)
        for other in [*self.prompts[at + 1 :], *self.prompts[:at]]:
            if other.document_id != prompt.document_id and len(other.tokens) == len(prompt.tokens):
                return other
        return None
