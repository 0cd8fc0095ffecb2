"""One drafter measured on prompts that are decoded together: every cell against autoregressive decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pipeline.axes import FULL, Cell, View
from pipeline.config.sweep import Sweep
from pipeline.decode.bench import Bench, Timed, timed_prefill
from pipeline.decode.cascade import CascadeDrafts
from pipeline.decode.dropmatch import DropMatch
from pipeline.decode.feature_head import drafts
from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import Chance
from pipeline.decode.sources import SOURCES, DraftSource
from pipeline.hardware import describe
from pipeline.kv.guides import are_guided
from pipeline.kv.refresh import Refresh
from pipeline.kv.views import PrefixView
from pipeline.metrics import Counts, Round
from pipeline.store.rows import FailedCell, PromptRow, Timing
from pipeline.sweep.grid import Drafter, texts
from pipeline.sweep.make_rows import CELL_ERRORS, at_chance, make_failure, make_row


class Inner(NamedTuple):
    """What drafts for the middle of a cascade: a drafter, its view, and its proposals of an inner round."""

    model: DecodeModel
    view: View
    gamma: int


class Views:
    """What a draft source keeps of each prompt of a bench, view by view.

    `prefill_s` is the time of reading each prompt, and of the target's guide where a view asks for one,
    beside the target's prefill: 0 where there is no model. The views of a cascade are its middle's, and
    `inner` is what drafts for that.
    """

    def __init__(
        self,
        bench: Bench,
        drafter: Drafter,
        model: DecodeModel | None,
        views: Iterable[View],
        inner: Inner | None = None,
    ) -> None:
        self.bench, self.drafter, self.model, self.inner = bench, drafter, model, inner
        self.inner_kept: list[PrefixView] = []
        self.wholes: list[PrefixView] = []  # where entries are chosen again
        self.prefill_s = [0.0] * len(bench.prompts)
        self.kept: dict[View, list[PrefixView]] = {view: [] for view in views}
        for row in range(len(bench.prompts)):
            if model is None:
                break
            if drafter.role == "target":
                prefix_views = [bench.self_kept[row][view] for view in self.kept]
                self.prefill_s[row] = bench.self_prefill_s[row]
            else:
                again = [FULL] if any(view.refresh for view in self.kept) else []
                prefix_views, self.prefill_s[row] = self.read(row, model, [*self.kept, *again])
                self.wholes += [prefix_views.pop() for _ in again]
            for kept, view in zip(self.kept.values(), prefix_views, strict=True):
                kept.append(view)
            if inner is not None:
                read, seconds = self.read(row, inner.model, [inner.view])
                self.inner_kept += read
                self.prefill_s[row] += seconds

    def read(self, row: int, model: DecodeModel, views: Sequence[View]) -> tuple[list[PrefixView], float]:
        """What views of a prompt keep, and the seconds of reading it."""
        bench, wanted = self.bench, [view.kept for view in views]
        prompt, guides = bench.prompts[row], bench.guides[row]
        kept, _, seconds = timed_prefill(model, prompt, wanted, bench.rehearse, guides)
        return kept, seconds + (bench.guide_s[row] if are_guided(views) else 0.0)

    def source(self, view: View, threshold: float = 0.0) -> DraftSource:
        """The source behind one view, as it is at the end of the prompts."""
        bench = self.bench
        if self.model is None:
            tokens = [prompt.tokens for prompt in bench.prompts]
            make = SOURCES[self.drafter.name]
            return make(tokens, bench.room, bench.target.model.num_tokens, bench.device)
        kept = self.kept[view]
        if self.inner is not None:
            model, gamma = self.inner.model, self.inner.gamma
            small = bench.drafter(model, self.inner_kept, gamma)
            return CascadeDrafts(small, bench.drafter(self.model, kept, gamma), gamma)
        runner = bench.drafter(self.model, kept)
        again = None
        if view.refresh:
            assert self.model is not None
            caches = bench.target.cache, runner.cache
            again = Refresh(*caches, self.wholes, kept[0].view, self.model.frequencies)
        return drafts(runner, kept, threshold, again)

    def kv_bytes(self, view: View) -> list[int]:
        """The bytes kept of each prompt, by all that draft; 0 for a source without a model."""
        if self.model is None:
            return [0] * len(self.bench.prompts)
        held = self.wholes if view.refresh else self.inner_kept
        beside = [kept.num_bytes for kept in held] or [0] * len(self.bench.prompts)
        return [kept.num_bytes + more for kept, more in zip(self.kept[view], beside, strict=True)]


@dataclass
class Trial:
    """A draft source, the bench that it is measured on, the cells to measure, how often and at which
    temperatures, and the shapes that ran before.

    `model` is None for a source without one, `inner` for all but a cascade.
    """

    sweep: Sweep
    bench: Bench
    drafter: Drafter
    model: DecodeModel | None
    cells: list[Cell]
    repeats: int
    temperatures: tuple[float, ...]
    eos: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    warm: set[tuple[object, ...]]
    inner: Inner | None = None

    def rows(self) -> Iterator[PromptRow | FailedCell]:
        """All cells of this drafter: AR and every cell in turn, `repeats` times over, every second time in
        the opposite order, so that a machine that gets faster or slower favours neither.

        A cell that fails ends alone; what fails for all of them, such as AR, is raised.
        """
        views = dict.fromkeys(cell.view for cell in self.cells)
        self.views = Views(self.bench, self.drafter, self.model, views, self.inner)
        for chance in texts(self.sweep, self.temperatures):
            yield from self.rows_of(chance)

    def rows_of(self, chance: Chance) -> Iterator[PromptRow | FailedCell]:
        runs: dict[Cell | None, list[Timed]] = {None: [], **{cell: [] for cell in self.cells}}  # None: AR
        compile_s = dict.fromkeys(runs, 0.0)
        failures: dict[Cell, Exception] = {}
        shape = (self.drafter.name, *self.bench.shape, chance.temperature)
        # The first runs of a shape are slow, and are thrown away.
        for repeat in range(-(shape not in self.warm), self.repeats):
            order = [cell for cell in runs if cell not in failures]
            for cell in order if repeat % 2 else reversed(order):
                before = self.bench.runners.compile_s
                try:
                    runs[cell].append(self.run(cell, chance))
                except CELL_ERRORS as error:
                    if cell is None:
                        raise
                    failures[cell] = error
                compile_s[cell] += self.bench.runners.compile_s - before
            if repeat < 0:
                runs = {cell: [] for cell in runs}
        self.warm.add(shape)
        compile_s[self.cells[0]] += compile_s[None]
        for cell in self.cells:
            if cell in failures:
                for prompt in self.bench.prompts:
                    yield make_failure("measure", cell, prompt, failures[cell])
            else:
                yield from self.cell_rows(cell, chance, runs[None], runs[cell], compile_s[cell])

    def run(self, cell: Cell | None, chance: Chance) -> Timed:
        if cell is None:
            return self.bench.autoregressive(chance, self.eos)
        if cell.rule == "dropmatch":
            settings = self.sweep.dropmatch
            masks = DropMatch(settings.masks, settings.dropout, chance.seed)
            chance = replace(chance, dropmatch=masks)
        source = self.views.source(cell.view, cell.threshold)
        return self.bench.speculative(source, cell.gamma, chance, self.eos)

    def cell_rows(
        self,
        cell: Cell,
        chance: Chance,
        plain: list[Timed],
        runs: list[Timed],
        compile_s: float,
    ) -> Iterator[PromptRow]:
        """One row a prompt; what the prompts shared, time and compilation, is divided among them."""
        bench = self.bench
        kv_bytes = self.views.kv_bytes(cell.view)
        share, hardware = 1 / len(bench.prompts), describe(bench.device)
        for row, prompt in enumerate(bench.prompts):
            ours, rounds = runs[0].tokens[row], runs[0].rounds[row]
            expected = plain[0].tokens[row]
            if len(expected) < 2:
                continue  # the prefill's token ended the text: there is nothing to time
            # Sampling draws other tokens than AR from the same distribution, and a lossy rule has other
            # texts: only exact greedy cells compare.
            compared = chance.temperature == 0 and not cell.lossy
            if compared:
                rounds = before_divergence(rounds, expected)
            counts = Counts.of(rounds, cell.gamma)
            others = [run.tokens[row] for run in [*runs, *plain] if run.tokens[row] != expected]
            gap = noise = None
            if others and compared:
                gap, noise = bench.divergence(row, expected, others[0])
            timing = Timing(
                decode_s=[run.seconds * share for run in runs],
                ar_decode_s=[run.seconds * share for run in plain],
                ar_num_tokens=len(expected) - 1,
                prefill_s=bench.prefill_s[row] + self.views.prefill_s[row],
                ar_prefill_s=bench.prefill_s[row],
                compile_s=compile_s * share,
                prompts_together=len(bench.prompts),
                together_with=bench.prompts[0].prompt_id,
                target_kv_bytes=bench.kv_bytes[row],
                peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
                exact=not others if compared else None,
                divergence_gap=gap,
                logit_noise=noise,
                hardware=hardware,
                text=self.tokenizer.decode(ours, skip_special_tokens=True),
            )
            yield make_row(
                "measure",
                at_chance(cell, chance),
                self.drafter,
                prompt,
                counts,
                ours,
                kv_bytes[row],
                self.sweep.looping_rate,
                len(ours) - 1 - counts.num_tokens,
                timing,
                bench.departure(row, expected, ours) if cell.lossy else None,
            )


def before_divergence(rounds: Sequence[Round], expected: Sequence[int]) -> list[Round]:
    """The rounds before the first token that autoregressive decoding does not have.

    From there on the two texts differ, and with them what there is to accept.
    """
    same: list[Round] = []
    at = 1
    for round_ in rounds:
        if list(round_.tokens) != list(expected[at : at + len(round_.tokens)]):
            break
        same.append(round_)
        at += len(round_.tokens)
    return same
