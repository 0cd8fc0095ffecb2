"""Stage sweep: all cells of a prompt, one typed row each.

A task is a slice of the prompts of one (data set, context). Replay needs the drafters only, and for heads
the target: a drafter reads a prompt once, that gives all views of it, and one more forward gives the
acceptance of every budget and γ (`replayer.py`). Measuring also loads the target, reads the task's prompts
once with it, and times autoregressive decoding and the picked cells in turn (`measurer.py`). Calibrating
times single steps (`step_times.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from kernels import dispatch
from pipeline.axes import Cell
from pipeline.config.schema import Config
from pipeline.decode.bench import Bench
from pipeline.decode.feature_head import LeanHead
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.runner import Runners
from pipeline.decode.target_reader import TargetReader
from pipeline.kv.guides import are_guided
from pipeline.kv.views import placed
from pipeline.models.generation import stop_tokens
from pipeline.models.heads.load import load_head
from pipeline.models.layers import share_frozen
from pipeline.models.load import ModelRef, load_model, shared_tokens
from pipeline.observe.events import Evaluated
from pipeline.store.files import read_rows, write_rows
from pipeline.store.layout import FAILED, SIZES
from pipeline.store.rows import Continuation, FailedCell, ModelSize, Prompt, PromptRow, StepTimes
from pipeline.sweep.grid import Drafter, views_of
from pipeline.sweep.make_rows import CELL_ERRORS, all_cells, make_failure
from pipeline.sweep.measurer import Inner, Trial
from pipeline.sweep.replayer import PromptReplay, PromptViews, lookup_rows
from pipeline.sweep.step_times import random_prompt, step_times


@dataclass(frozen=True)
class ReplayTask:
    """Prompts [first, last) of one file, with their continuations, greedy and sampled; rows to `output`."""

    prompts: Path
    continuations: tuple[Path, ...]
    first: int
    last: int
    output: Path


@dataclass(frozen=True)
class CalibrateTask:
    """Time single steps at one context."""

    context: str
    prompt_tokens: int
    output: Path


@dataclass(frozen=True)
class MeasureTask:
    """Prompts [first, last) of one file, the cells to measure, how often and at which temperatures.

    With `beside`, single steps of a trained drafter are timed before and after the prompts, in the same call:
    whenever cells are measured again, these steps are timed again too.
    """

    prompts: Path
    picks: tuple[Cell, ...]
    repeats: int
    temperatures: tuple[float, ...]
    first: int
    last: int
    output: Path
    beside: CalibrateTask | None = None


log = logging.getLogger(__name__)

SweepTask = ReplayTask | MeasureTask | CalibrateTask


def failures_of(task: ReplayTask | MeasureTask) -> Path:
    return task.output.parent.parent / FAILED / task.output.name


@dataclass
class Contender:
    """A draft source with two forms of its model over the same memory: `model` replays, `fast` decodes.

    Both are None for a source without a model. `inner` drafts within a cascade.
    """

    drafter: Drafter
    model: PreTrainedModel | None = field(repr=False)
    fast: DecodeModel | None = field(repr=False)
    inner: Inner | None = field(default=None, repr=False)


class Evaluator:
    """The models, loaded once per worker; a call does one task."""

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
        refs = [ref for drafter in drafters for ref in (drafter.ref, drafter.inner) if ref is not None]
        self.num_tokens = shared_tokens(self.tokenizer, target, *refs)
        self.loaded: list[tuple[ModelRef, tuple[PreTrainedModel, DecodeModel]]] = []
        self.contenders = [self.contender(drafter) for drafter in drafters]
        self.runners = Runners(config.decode.compile)
        self.warm: set[tuple[object, ...]] = set()

    def load(self, ref: ModelRef) -> tuple[PreTrainedModel, DecodeModel]:
        """A model, or the one that was loaded before: the drafter of a cascade may be evaluated itself."""
        for known, pair in self.loaded:
            if known == ref:
                return pair
        model = load_model(ref, self.num_tokens, self.device)
        if self.config.drafter.kind == "first_layers":
            share_frozen(model, [pair[0] for _, pair in self.loaded])
        self.loaded.append((ref, (model, decode_model(model, self.config.decode.prefill_chunk))))
        return self.loaded[-1][1]

    @cached_property
    def target(self) -> tuple[PreTrainedModel, DecodeModel]:
        """Loaded on first use: replay of trained drafters does not need it, but for heads."""
        return self.load(self.target_ref)

    @cached_property
    def reader(self) -> TargetReader:
        """What heads read is read once for all of them."""
        return TargetReader(self.target[1])

    def contender(self, drafter: Drafter) -> Contender:
        if drafter.ref is None:
            return Contender(drafter, None, None)
        if drafter.kind == "head":
            head = load_head(drafter.ref, self.target[0], self.device)
            return Contender(drafter, head, LeanHead(head, self.reader))
        pair = self.target if drafter.role == "target" else self.load(drafter.ref)
        inner = None
        if drafter.inner is not None and (cascade := self.sweep.cascade):
            view = placed(cascade.view, drafter.positions)
            inner = Inner(self.load(drafter.inner)[1], view, cascade.gamma)
        return Contender(drafter, *pair, inner)

    def __call__(self, task: SweepTask) -> Evaluated:
        """Do a task unless its rows are there; failed cells are written apart and tried again next time."""
        if done := earlier(task):
            return done
        if isinstance(task, CalibrateTask):
            return Evaluated(rows=self.calibrate(task))
        failures = failures_of(task)
        again = len(read_rows(failures, FailedCell)) if failures.exists() else 0
        rows: list[PromptRow] = []
        failed: list[FailedCell] = []
        for row in self.replay(task) if isinstance(task, ReplayTask) else self.measure(task):
            if isinstance(row, PromptRow):
                rows.append(row)
            else:
                failed.append(row)
        if failed:
            write_rows(failures, failed)
        write_rows(task.output, rows)
        if not failed:
            failures.unlink(missing_ok=True)
        return evaluated(rows, len(failed), again)

    def replay(self, task: ReplayTask) -> Iterator[PromptRow | FailedCell]:
        """Acceptance of every drafter, view, control and γ on these prompts, without decoding."""
        prompts = read_rows(task.prompts, Prompt)
        columns = zip(*(read_rows(file, Continuation) for file in task.continuations), strict=True)
        texts = list(columns)
        guides, folder = [first.guide for first, *_ in texts], task.continuations[0].parent.parent
        for contender in self.contenders:
            made: PromptReplay | None = None
            if contender.model is not None and contender.fast is not None:
                views, inner = views_of(self.sweep, contender.drafter), contender.inner
                made = PromptReplay(
                    self.sweep,
                    contender.drafter,
                    contender.model,
                    PromptViews(contender.fast, prompts, views, guides, folder),
                    inner and PromptViews(inner.model, prompts, [inner.view], guides),
                )
            for at in range(task.first, task.last):
                try:
                    if made is not None:
                        yield from made.rows(prompts[at], texts[at])
                        continue
                    for text in texts[at]:
                        yield from lookup_rows(
                            self.sweep, contender.drafter, prompts[at], text, self.num_tokens
                        )
                except CELL_ERRORS as error:
                    cell = all_cells(self.sweep, contender.drafter, prompts[at])
                    yield make_failure("replay", cell, prompts[at], error)

    def measure(self, task: MeasureTask) -> Iterator[PromptRow | FailedCell]:
        """Wall clock of the picked cells against autoregressive decoding, and of the steps beside them."""
        prompts = read_rows(task.prompts, Prompt)
        together = self.sweep.measure.prompts_together
        # The trained drafters have one shape.
        trained = [contender for contender in self.contenders if contender.drafter.baseline is None][:1]
        steps = self.step_times(task.beside, trained) if task.beside else []
        for at in range(task.first, task.last, together):
            batch = prompts[at : min(at + together, task.last)]
            yield from self.measure_batch(batch, task)
        if task.beside:
            write_rows(task.beside.output, [*steps, *self.step_times(task.beside, trained)])

    def measure_batch(self, batch: list[Prompt], task: MeasureTask) -> Iterator[PromptRow | FailedCell]:
        (target, fast_target), picks = self.target, task.picks
        drafting = {one.drafter.name for one in self.contenders if one.drafter.role == "target"}
        self_views = [pick.view for pick in picks if pick.drafter in drafting]
        within = [contender.inner.view for contender in self.contenders if contender.inner]
        bench: Bench | None = None
        for contender in self.contenders:
            cells = [pick for pick in picks if pick.drafter == contender.drafter.name]
            if not cells:
                continue
            try:
                bench = bench or Bench(
                    self.runners,
                    fast_target,
                    batch,
                    max(self.sweep.gammas),
                    list(dict.fromkeys(self_views)),
                    rehearse=True,
                    guided=are_guided([*(pick.view for pick in picks), *within]),
                    refreshed=any(pick.view.refresh for pick in picks),
                )
                trial = Trial(
                    self.sweep,
                    bench,
                    contender.drafter,
                    contender.fast,
                    cells,
                    task.repeats,
                    task.temperatures,
                    stop_tokens(target),
                    self.tokenizer,
                    self.warm,
                    contender.inner,
                )
                yield from list(trial.rows())
            except CELL_ERRORS as error:
                for prompt in batch:
                    yield make_failure(
                        "measure", all_cells(self.sweep, contender.drafter, prompt), prompt, error
                    )

    def calibrate(self, task: CalibrateTask) -> int:
        """Step times of one representative of each kind of draft source: the trained ones have one shape."""
        kinds: dict[str | None, Contender] = {}
        for contender in self.contenders:
            if contender.drafter.predictable:
                kinds.setdefault(contender.drafter.baseline, contender)
        times = self.step_times(task, kinds.values())
        write_rows(task.output.parent.parent / SIZES, self.sizes())
        write_rows(task.output, times)
        return len(times)

    def step_times(self, task: CalibrateTask, sources: Iterable[Contender]) -> list[StepTimes]:
        """Step times of these draft sources at a context; a source that fails is logged and left out."""
        target, new_tokens = self.target[1], self.config.data.max_new_tokens
        prompt = random_prompt(task.context, task.prompt_tokens, target.num_tokens, new_tokens)
        times: list[StepTimes] = []
        for contender in sources:
            try:
                times += step_times(
                    self.sweep, self.runners, target, contender.drafter, contender.fast, prompt, new_tokens
                )
            except CELL_ERRORS as error:
                if isinstance(error, torch.AcceleratorError):  # the process has lost its GPU
                    raise
                name = contender.drafter.name
                log.warning("no steps were timed of %s at %s: %s", name, task.context, error)
        return times

    def sizes(self) -> list[ModelSize]:
        """Sizes of the target, of every drafter that has a model of its own, and of what a cascade adds: its
        drafter's weights, and the KV of a token in the caches of drafter and middle."""
        sizes = [size_of("target", *self.target)]
        for contender in self.contenders:
            name, model, fast = contender.drafter.name, contender.model, contender.fast
            if model is None or fast is None:
                continue
            if contender.drafter.inner is not None:
                sizes.append(size_of(name, *self.load(contender.drafter.inner), fast))
            elif contender.drafter.baseline is None:
                sizes.append(size_of(name, model, fast))
        return sizes


def size_of(name: str, weights: PreTrainedModel, *caches: DecodeModel) -> ModelSize:
    """The weights of one model, and the KV of a token in the caches of one or several."""
    return ModelSize(
        name=name,
        weight_bytes=sum(p.numel() * p.element_size() for p in weights.parameters()),
        kv_bytes_per_token=sum(fast.geometry.num_bytes(1, 1) for fast in caches),
    )


def earlier(task: SweepTask) -> Evaluated | None:
    """What a task gave before; None where something is left to do."""
    if not task.output.exists():
        return None
    if isinstance(task, CalibrateTask):
        return Evaluated(rows=len(read_rows(task.output, StepTimes)))
    calibration = task.beside if isinstance(task, MeasureTask) else None
    if failures_of(task).exists() or (calibration and not calibration.output.exists()):
        return None
    return evaluated(read_rows(task.output, PromptRow))


def evaluated(rows: Sequence[PromptRow], failed: int = 0, retried: int = 0) -> Evaluated:
    """The counts of a task. Rows whose proposals replay cannot know, and lossy ones, are in no acceptance."""
    accepted: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows:
        if row.cell.control is None and not row.cell.lossy and row.counts.num_proposed is not None:
            key = row.cell.drafter, row.cell.dataset
            kept, proposed = accepted.get(key, (0.0, 0.0))
            accepted[key] = kept + row.counts.num_accepted, proposed + row.counts.num_proposed
    return Evaluated(
        rows=len(rows),
        cells=len(rows),
        failed=failed,
        retried=retried,
        accepted=accepted,
        tokens=sum(row.counts.num_tokens * len(row.timing.decode_s) for row in rows if row.timing),
        seconds=sum(sum(row.timing.decode_s) for row in rows if row.timing),
    )
