"""Stage sweep: one prompt at a time, all cells of it, one typed row each.

A task is a slice of the prompts of one (data set, context). Replay needs the drafters only: a drafter reads
a prompt once, that gives all views of it, and one more forward gives the acceptance of every budget and γ.
Measuring also loads the target, reads the prompt once with it, and times autoregressive decoding and every
measured cell in turn, `repeats` times over.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel

from pipeline import replay
from pipeline.artifacts import read_rows, write_rows
from pipeline.config import Config
from pipeline.decoding import Round, Sampler, autoregressive, speculate
from pipeline.kv import FULL, PrefixView, View, ViewCache, read_prefix, view_of
from pipeline.metrics import repetition_rate
from pipeline.models import ModelRef, load_model, stop_tokens
from pipeline.rows import Cell, Continuation, FailedCell, Prompt, PromptRow


@dataclass(frozen=True)
class Drafter:
    """A drafter to evaluate, and how many positions it was trained on."""

    name: str
    ref: ModelRef
    trained_positions: int


@dataclass(frozen=True)
class SweepTask:
    """Prompts [first, last) of one file, replayed or measured; `output` gets the rows."""

    mode: Literal["replay", "measure"]
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
        self, config: Config, target: ModelRef, drafters: Sequence[Drafter], tokenizer: Path, device: torch.device
    ) -> None:
        self.config, self.device, self.target_ref = config, device, target
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.drafters = [(d, load_model(d.ref, len(self.tokenizer), device)) for d in drafters]
        self.target: PreTrainedModel | None = None

    def __call__(self, task: SweepTask) -> tuple[int, int]:
        """Do a task unless its rows are there; failed cells are written apart and tried again next time."""
        if task.output.exists() and not task.failures.exists():
            return len(read_rows(task.output, PromptRow)), 0
        prompts = read_rows(task.prompts, Prompt)
        continuations = read_rows(task.continuations, Continuation)
        rows: list[PromptRow] = []
        failed: list[FailedCell] = []
        run = self.replay if task.mode == "replay" else self.measure
        for row in run(prompts, continuations, range(task.first, task.last)):
            (rows if isinstance(row, PromptRow) else failed).append(row)  # type: ignore[arg-type]
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
                except (ArithmeticError, RuntimeError) as error:
                    yield self.failure("replay", drafter, prompts[index], error)

    def view_cells(self) -> list[ViewCell]:
        """The sweep's views, then those of its controls."""
        sweep = self.config.sweep
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
    ) -> Iterator[PromptRow]:
        if len(continuation.tokens) < 2:
            return  # the prefill's token ended the text: there is nothing to draft
        cells, own = self.view_cells(), views.of(prompt)
        if "other_prompt" in self.config.sweep.controls:
            other = views.of(views.partner(prompt))
        kept = [(other if cell.control == "other_prompt" else own)[cell.view] for cell in cells]
        matches = replay.match_views(model, kept, continuation.tokens).tolist()
        for cell, view, match in zip(cells, kept, matches, strict=True):
            for gamma in self.config.sweep.gammas:
                rounds = replay.rounds(match, gamma, prompt.max_new_tokens, continuation.eos_at is not None)
                yield self.row(
                    "replay", drafter, prompt, cell, gamma, rounds, continuation.repetition_rate, view.num_bytes
                )

    # ── measure ───────────────────────────────────────────────────────────────────────────────────

    def measure(
        self, prompts: list[Prompt], continuations: list[Continuation], mine: range
    ) -> Iterator[PromptRow | FailedCell]:
        """Wall clock of the measured cells against autoregressive decoding, interleaved, on these prompts.

        The first prompt of the range warms up and gives no rows.
        """
        if self.target is None:
            self.target = load_model(self.target_ref, len(self.tokenizer), self.device)
        for index in mine:
            for drafter, model in self.drafters:
                if not chosen(drafter.name, self.config.sweep.measure.drafters):
                    continue
                try:
                    rows = list(self.measure_prompt(drafter, model, prompts[index]))
                except (ArithmeticError, RuntimeError) as error:
                    yield self.failure("measure", drafter, prompts[index], error)
                    continue
                if index != mine.start:
                    yield from rows

    def measure_prompt(
        self, drafter: Drafter, model: PreTrainedModel, prompt: Prompt
    ) -> Iterator[PromptRow]:
        assert self.target is not None
        sweep = self.config.sweep
        gammas = [gamma for gamma in sweep.gammas if chosen(gamma, sweep.measure.gammas)]
        cells = [
            ViewCell(policy, budget, None)
            for policy in sweep.policies
            for budget in sweep.budgets
            if chosen(budget, sweep.measure.budgets)
        ]
        room = prompt.max_new_tokens + max(gammas)
        target_views, logits_1V, ar_prefill_s = self.timed_prefill(self.target, prompt, [FULL])
        views, _, prefill_s = self.timed_prefill(model, prompt, [cell.view for cell in cells])
        target_cache = ViewCache(target_views, room)
        caches = [ViewCache([view], room) for view in views]
        for temperature in sweep.temperatures:
            for seed in sweep.seeds if temperature > 0 else sweep.seeds[:1]:
                first = int(Sampler.seeded(temperature, seed, self.device).choose(logits_1V)[0])
                runs: dict[tuple[int, int], list[Timed]] = {}
                ar_runs: list[Timed] = []
                for _ in range(sweep.measure.repeats):
                    ar_runs.append(self.time_ar(target_cache, prompt, first, temperature, seed))
                    for number, cache in enumerate(caches):
                        for gamma in gammas:
                            runs.setdefault((number, gamma), []).append(
                                self.time_speculation(
                                    model, target_cache, cache, prompt, first, gamma, temperature, seed
                                )
                            )
                if len(ar_runs[0].tokens) < 2:
                    continue  # the prefill's token ended the text: there is nothing to time
                for (number, gamma), timed in runs.items():
                    tokens = timed[0].tokens
                    rounds = [(r.proposed, r.accepted, len(r.tokens)) for r in timed[0].rounds]
                    row = self.row(
                        "measure",
                        drafter,
                        prompt,
                        cells[number],
                        gamma,
                        rounds,
                        repetition_rate(tokens),
                        views[number].num_bytes,
                        temperature,
                        seed,
                    )
                    yield row.model_copy(
                        update={
                            "exact": all(t.tokens == ar_runs[0].tokens for t in [*timed, *ar_runs])
                            if temperature == 0
                            else None,
                            "prefill_s": ar_prefill_s + prefill_s,
                            "ar_prefill_s": ar_prefill_s,
                            "decode_s": [t.seconds for t in timed],
                            "ar_decode_s": [t.seconds for t in ar_runs],
                            "ar_num_tokens": len(ar_runs[0].tokens) - 1,
                            "target_kv_bytes": target_views[0].num_bytes,
                            "peak_memory_bytes": max(t.peak_memory_bytes for t in timed),
                            "text": self.tokenizer.decode(tokens, skip_special_tokens=True),
                        }
                    )

    def timed_prefill(
        self, model: PreTrainedModel, prompt: Prompt, views: Sequence[View]
    ) -> tuple[list[PrefixView], torch.Tensor, float]:
        """One prefill for all views of a prompt, its last logits [1, V], and its seconds."""
        tokens_1S = torch.tensor([prompt.tokens], device=self.device)
        began = self.clock()
        kept, logits_1V = read_prefix(model, tokens_1S, [(len(prompt.tokens), view) for view in views])
        return kept, logits_1V, self.clock() - began

    def time_ar(
        self, cache: ViewCache, prompt: Prompt, first: int, temperature: float, seed: int
    ) -> Timed:
        assert self.target is not None
        sampler, eos = Sampler.seeded(temperature, seed, self.device), stop_tokens(self.target)
        began = self.start_run()
        tokens = [
            first,
            *autoregressive(
                self.target, cache, len(prompt.tokens), first, prompt.max_new_tokens, eos, sampler
            ),
        ]
        seconds = self.clock() - began
        cache.rollback(cache.appended)
        return Timed(tokens, [], seconds, self.peak_memory())

    def time_speculation(
        self,
        drafter: PreTrainedModel,
        target_cache: ViewCache,
        drafter_cache: ViewCache,
        prompt: Prompt,
        first: int,
        gamma: int,
        temperature: float,
        seed: int,
    ) -> Timed:
        assert self.target is not None
        sampler, eos = Sampler.seeded(temperature, seed, self.device), stop_tokens(self.target)
        began = self.start_run()
        rounds = list(
            speculate(
                self.target, drafter, target_cache, drafter_cache, len(prompt.tokens), first, gamma,
                prompt.max_new_tokens, eos, sampler,
            )
        )  # fmt: skip
        seconds = self.clock() - began
        for cache in (target_cache, drafter_cache):
            cache.rollback(cache.appended)
        tokens = [first, *(token for one in rounds for token in one.tokens)]
        return Timed(tokens, rounds, seconds, self.peak_memory())

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start_run(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self.clock()

    def peak_memory(self) -> int:
        """Peak bytes of this run on a GPU; on a CPU, of the process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────

    def row(
        self,
        mode: Literal["replay", "measure"],
        drafter: Drafter,
        prompt: Prompt,
        cell: ViewCell,
        gamma: int,
        rounds: Sequence[tuple[int, int, int]],
        repetition: float,
        drafter_kv_bytes: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> PromptRow:
        counts = replay.count(rounds, gamma)
        return PromptRow(
            **self.cell(drafter, prompt, cell, gamma, temperature, seed).model_dump(),
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
            looping=repetition > self.config.sweep.looping_rate,
            in_trained_range=len(prompt.tokens) + prompt.max_new_tokens <= drafter.trained_positions,
            drafter_kv_bytes=drafter_kv_bytes,
        )

    def cell(
        self, drafter: Drafter, prompt: Prompt, cell: ViewCell, gamma: int, temperature: float, seed: int | None
    ) -> Cell:
        return Cell(
            drafter=drafter.name,
            dataset=prompt.dataset,
            context=prompt.context,
            policy=cell.policy,
            budget=cell.budget,
            control=cell.control,
            gamma=gamma,
            temperature=temperature,
            seed=self.config.sweep.seeds[0] if seed is None else seed,
        )

    def failure(
        self, mode: Literal["replay", "measure"], drafter: Drafter, prompt: Prompt, error: Exception
    ) -> FailedCell:
        """All cells of one drafter and prompt, which share a prefill and fail together."""
        every = ViewCell("all", "full", None)
        return FailedCell(
            **self.cell(drafter, prompt, every, 0, 0.0, None).model_dump(),
            mode=mode,
            prompt_id=prompt.prompt_id,
            error=f"{type(error).__name__}: {error}",
        )


@dataclass(frozen=True)
class Timed:
    """One timed run; `tokens` begins with the prefill's."""

    tokens: list[int]
    rounds: list[Round]
    seconds: float
    peak_memory_bytes: int


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

    def partner(self, prompt: Prompt) -> Prompt:
        """The next prompt of the file that has the same length and comes from another document.

        Raises:
            RuntimeError: if there is none.
        """
        at = next(i for i, other in enumerate(self.prompts) if other.prompt_id == prompt.prompt_id)
        for other in [*self.prompts[at + 1 :], *self.prompts[:at]]:
            if other.document_id != prompt.document_id and len(other.tokens) == len(prompt.tokens):
                return other
        raise RuntimeError(
            f"the control other_prompt of {prompt.prompt_id} needs a prompt of {len(prompt.tokens)} tokens from "
            "another document; take more documents, or leave it out of sweep.controls"
        )


def chosen(value: object, selection: Sequence[object]) -> bool:
    """Whether a value is in a selection; an empty selection takes everything."""
    return not selection or value in selection
