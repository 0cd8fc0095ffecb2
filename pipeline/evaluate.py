"""Stage sweep: one prompt at a time, all cells of it, one typed row each.

A task is a slice of the prompts of one (data set, context). Replay needs the drafters only: a drafter reads
a prompt once, that gives all views of it, and one more forward gives the acceptance of every budget and γ.
Measuring also loads the target, reads the prompt once with it, and times autoregressive decoding and every
measured cell in turn, `repeats` times over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel

from pipeline import replay
from pipeline.artifacts import read_rows, write_rows
from pipeline.config import Config
from pipeline.decoding import NotFinite
from pipeline.kv import PrefixView, View, ViewCache, read_prefix, view_of
from pipeline.measure import Bench, Chance, Timed, timed_prefill
from pipeline.metrics import repetition_rate
from pipeline.models import ModelRef, load_model
from pipeline.replay import Counts
from pipeline.rows import Cell, Continuation, FailedCell, Prompt, PromptRow

log = logging.getLogger(__name__)

Mode = Literal["replay", "measure"]
# What a cell may end in without ending the others: logits that are not finite, no memory.
CELL_ERRORS = (ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class Drafter:
    """A drafter to evaluate, and how many positions it was trained on."""

    name: str
    ref: ModelRef
    trained_positions: int


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


@dataclass(frozen=True)
class ViewCell:
    """A cell's view and control; the γ, temperature and seed axes share it."""

    policy: str
    budget: int | Literal["full"]
    control: str | None

    @property
    def view(self) -> View:
        return view_of(self.policy, self.budget)


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
        self.drafters = [(d, load_model(d.ref, len(self.tokenizer), device)) for d in drafters]
        self.target: PreTrainedModel | None = None
        self.warm: set[tuple[str, str, str]] = set()

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
        for drafter, model in self.drafters:
            views = PromptViews(model, prompts, [cell.view for cell in self.view_cells()])
            for index in mine:
                try:
                    yield from self.replay_prompt(drafter, model, prompts[index], continuations[index], views)
                except CELL_ERRORS as error:
                    yield self.failure("replay", drafter, prompts[index], error)

    def view_cells(self) -> list[ViewCell]:
        """The sweep's views, then those of its controls."""
        sweep = self.sweep
        cells = [ViewCell(policy, budget, None) for policy in sweep.policies for budget in sweep.budgets]
        if "other_prompt" in sweep.controls:
            cells += [ViewCell(c.policy, c.budget, "other_prompt") for c in cells if c.budget != 0]
        if "no_prefix" in sweep.controls:
            cells += [ViewCell(policy, 0, "no_prefix") for policy in sweep.policies]
        return cells

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
        cells, own, partner = self.view_cells(), views.of(prompt), views.partner(prompt)
        if partner is None:  # one document only: the other cells do not depend on it
            log.warning("no other document for %s: its control other_prompt is left out", prompt.prompt_id)
            cells = [cell for cell in cells if cell.control != "other_prompt"]
        other = own if partner is None else views.of(partner)
        kept = [(other if cell.control == "other_prompt" else own)[cell.view] for cell in cells]
        matches, finite = replay.match_views(model, kept, continuation.tokens)
        greedy = Chance(0.0, self.sweep.seeds[0])
        for cell, view, match, good in zip(cells, kept, matches.tolist(), finite.tolist(), strict=True):
            if not good:
                yield self.failure("replay", drafter, prompt, NotFinite("logits not finite in replay"), cell)
                continue
            for gamma in self.sweep.gammas:
                rounds = replay.rounds(match, gamma, prompt.max_new_tokens, continuation.eos_at is not None)
                yield self.row(
                    "replay",
                    self.cell(drafter, prompt, cell, gamma, greedy),
                    drafter,
                    prompt,
                    replay.count(rounds, gamma),
                    continuation.tokens,
                    view,
                )

    # ── measure ───────────────────────────────────────────────────────────────────────────────────

    def measure(
        self, prompts: list[Prompt], continuations: list[Continuation], mine: range
    ) -> Iterator[PromptRow | FailedCell]:
        """Wall clock of the measured cells against autoregressive decoding, interleaved, on these prompts."""
        if self.target is None:
            self.target = load_model(self.target_ref, len(self.tokenizer), self.device)
        measured = [pair for pair in self.drafters if chosen(pair[0].name, self.sweep.measure.drafters)]
        for index in mine:
            prompt = prompts[index]
            bench: Bench | None = None
            for drafter, model in measured:
                try:
                    bench = bench or Bench(self.target, prompt, max(self.sweep.gammas))
                    shape = (drafter.name, prompt.dataset, prompt.context)
                    if shape not in self.warm:  # the first runs of a shape are slow, and are thrown away
                        list(self.measure_prompt(bench, drafter, model, repeats=1))
                        self.warm.add(shape)
                    yield from list(self.measure_prompt(bench, drafter, model, self.sweep.measure.repeats))
                except CELL_ERRORS as error:
                    yield self.failure("measure", drafter, prompt, error)

    def measure_prompt(
        self, bench: Bench, drafter: Drafter, model: PreTrainedModel, repeats: int
    ) -> Iterator[PromptRow]:
        sweep, prompt = self.sweep, bench.prompt
        gammas = [gamma for gamma in sweep.gammas if chosen(gamma, sweep.measure.gammas)]
        cells = [
            cell
            for cell in self.view_cells()
            if not cell.control and chosen(cell.budget, sweep.measure.budgets)
        ]
        views, _, prefill_s = timed_prefill(model, prompt, [cell.view for cell in cells])
        caches = [ViewCache([view], bench.room) for view in views]
        for temperature in sweep.temperatures:
            for seed in sweep.seeds if temperature > 0 else sweep.seeds[:1]:
                chance = Chance(temperature, seed)
                plain: list[Timed] = []
                runs: dict[tuple[int, int], list[Timed]] = {}
                for _ in range(repeats):
                    plain.append(bench.autoregressive(chance))
                    for number, cache in enumerate(caches):
                        for gamma in gammas:
                            timed = bench.speculative(model, cache, gamma, chance)
                            runs.setdefault((number, gamma), []).append(timed)
                if len(plain[0].tokens) < 2:
                    continue  # the prefill's token ended the text: there is nothing to time
                for (number, gamma), timed_runs in runs.items():
                    one = timed_runs[0]
                    counts = replay.count(
                        [(r.proposed, r.accepted, len(r.tokens)) for r in one.rounds], gamma
                    )
                    cell = self.cell(drafter, prompt, cells[number], gamma, chance)
                    row = self.row("measure", cell, drafter, prompt, counts, one.tokens, views[number])
                    # Sampling draws other tokens than AR from the same distribution: only greedy compares.
                    others = [run.tokens for run in [*timed_runs, *plain] if run.tokens != plain[0].tokens]
                    gap = noise = None
                    if others and temperature == 0:
                        gap, noise = bench.divergence(plain[0].tokens, others[0])
                    yield row.model_copy(
                        update={
                            "target_kv_bytes": bench.kv_bytes,
                            "exact": None if temperature else not others,
                            "divergence_gap": gap,
                            "logit_noise": noise,
                            "prefill_s": bench.prefill_s + prefill_s,
                            "ar_prefill_s": bench.prefill_s,
                            "decode_s": [run.seconds for run in timed_runs],
                            "ar_decode_s": [run.seconds for run in plain],
                            "ar_num_tokens": len(plain[0].tokens) - 1,
                            "peak_memory_bytes": max(run.peak_memory_bytes for run in timed_runs),
                            "text": self.tokenizer.decode(one.tokens, skip_special_tokens=True),
                        }
                    )

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────

    def cell(self, drafter: Drafter, prompt: Prompt, cell: ViewCell, gamma: int, chance: Chance) -> Cell:
        return Cell(
            drafter=drafter.name,
            dataset=prompt.dataset,
            context=prompt.context,
            policy=cell.policy,
            budget=cell.budget,
            control=cell.control,
            gamma=gamma,
            temperature=chance.temperature,
            seed=chance.seed,
        )

    def row(
        self,
        mode: Mode,
        cell: Cell,
        drafter: Drafter,
        prompt: Prompt,
        counts: Counts,
        tokens: Sequence[int],
        view: PrefixView,
    ) -> PromptRow:
        repetition = repetition_rate(tokens)
        return PromptRow(
            **cell.model_dump(),
            mode=mode,
            prompt_id=prompt.prompt_id,
            document_id=prompt.document_id,
            num_tokens=counts.num_tokens,
            num_rounds=counts.num_rounds,
            num_proposed=counts.num_proposed,
            num_accepted=counts.num_accepted,
            reached=list(counts.reached),
            kept=list(counts.kept),
            repetition_rate=repetition,
            looping=repetition > self.sweep.looping_rate,
            in_trained_range=len(prompt.tokens) + prompt.max_new_tokens <= drafter.trained_positions,
            drafter_kv_bytes=view.num_bytes,
        )

    def failure(
        self,
        mode: Mode,
        drafter: Drafter,
        prompt: Prompt,
        error: Exception,
        cell: ViewCell = ViewCell("all", "full", None),
    ) -> FailedCell:
        """A view's cells of one drafter and prompt; by default all of them, which share a prefill."""
        given = self.cell(drafter, prompt, cell, 0, Chance(0.0, self.sweep.seeds[0]))
        return FailedCell(
            **given.model_dump(),
            mode=mode,
            prompt_id=prompt.prompt_id,
            error=f"{type(error).__name__}: {error}",
        )


class PromptViews:
    """A drafter's views of the prompts of one file, read when needed; the last two prompts are remembered."""

    def __init__(self, model: PreTrainedModel, prompts: list[Prompt], views: Sequence[View]) -> None:
        self.model, self.prompts, self.views = model, prompts, list(dict.fromkeys(views))
        self.recent: dict[str, dict[View, PrefixView]] = {}

    def of(self, prompt: Prompt) -> dict[View, PrefixView]:
        if prompt.prompt_id not in self.recent:
            while len(self.recent) > 1:
                self.recent.pop(next(iter(self.recent)))
            tokens_1S = torch.tensor([prompt.tokens], device=self.model.device)
            kept, _ = read_prefix(self.model, tokens_1S, [(len(prompt.tokens), view) for view in self.views])
            self.recent[prompt.prompt_id] = dict(zip(self.views, kept, strict=True))
        return self.recent[prompt.prompt_id]

    def partner(self, prompt: Prompt) -> Prompt | None:
        """The next prompt of the file that has the same length and comes from another document, if any."""
        at = next(i for i, other in enumerate(self.prompts) if other.prompt_id == prompt.prompt_id)
        for other in [*self.prompts[at + 1 :], *self.prompts[:at]]:
            if other.document_id != prompt.document_id and len(other.tokens) == len(prompt.tokens):
                return other
        return None


def chosen(value: object, selection: Sequence[object]) -> bool:
    """Whether a value is in a selection; an empty selection takes everything."""
    return not selection or value in selection
