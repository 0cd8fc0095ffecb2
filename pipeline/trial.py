"""One drafter measured on prompts that are decoded together: every cell against autoregressive decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline import replay
from pipeline.cells import (
    CELL_ERRORS,
    Drafter,
    DraftLength,
    ViewCell,
    make_cell,
    make_failure,
    make_row,
    measured_lengths,
    measured_views,
)
from pipeline.config import Sweep
from pipeline.kv import PrefixView
from pipeline.lean import DecodeModel
from pipeline.measure import Bench, Chance, Timed, timed_prefill
from pipeline.rows import FailedCell, PromptRow

Key = tuple[ViewCell, DraftLength]


@dataclass
class Trial:
    """A drafter, the bench that it is measured on, and the shapes that have run before."""

    sweep: Sweep
    bench: Bench
    drafter: Drafter
    model: DecodeModel
    eos: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    warm: set[tuple[object, ...]]

    def rows(self) -> Iterator[PromptRow | FailedCell]:
        """All cells of this drafter: AR and every cell in turn, `repeats` times over.

        A cell that fails ends alone; what fails for all of them, such as AR, is raised.
        """
        cells = measured_views(self.sweep)
        self.views: dict[ViewCell, list[PrefixView]] = {cell: [] for cell in cells}
        self.prefill_s = []
        for prompt in self.bench.prompts:
            kept, _, seconds = timed_prefill(self.model, prompt, [cell.view for cell in cells])
            self.prefill_s.append(seconds)
            for cell, view in zip(cells, kept, strict=True):
                self.views[cell].append(view)
        keys = [(cell, length) for cell in cells for length in measured_lengths(self.sweep)]
        for temperature in self.sweep.temperatures:
            for seed in self.sweep.seeds if temperature > 0 else self.sweep.seeds[:1]:
                yield from self.rows_of(keys, Chance(temperature, seed))

    def rows_of(self, keys: list[Key], chance: Chance) -> Iterator[PromptRow | FailedCell]:
        plain: list[Timed] = []
        runs: dict[Key, list[Timed]] = {key: [] for key in keys}
        compile_s = dict.fromkeys(keys, 0.0)
        failures: dict[Key, Exception] = {}
        place = (self.drafter.name, *self.bench.shape, chance.temperature)
        repeats = self.sweep.measure.repeats
        # The first runs of a shape are slow, and are thrown away.
        for repeat in range(-(place not in self.warm), repeats):
            before = self.bench.sides.compile_s
            plain.append(self.bench.autoregressive(chance, self.eos))
            for key in keys:
                try:
                    runs[key] += [] if key in failures else [self.speculate(key, chance)]
                except CELL_ERRORS as error:
                    failures[key] = error
                compile_s[key] += self.bench.sides.compile_s - before
                before = self.bench.sides.compile_s
            if repeat < 0:
                plain.clear()
                runs = {key: [] for key in keys}
        self.warm.add(place)
        for key in keys:
            if key in failures:
                for prompt in self.bench.prompts:
                    yield make_failure("measure", self.sweep, self.drafter, prompt, failures[key], *key)
            else:
                yield from self.cell_rows(key, chance, plain, runs[key], compile_s[key])

    def speculate(self, key: Key, chance: Chance) -> Timed:
        cell, length = key
        side = self.bench.drafter(self.model, self.views[cell])
        return self.bench.speculative(side, length.gamma, chance, self.eos, length.threshold)

    def cell_rows(
        self,
        key: Key,
        chance: Chance,
        plain: list[Timed],
        runs: list[Timed],
        compile_s: float,
    ) -> Iterator[PromptRow]:
        """One row a prompt; what the prompts shared, time and compilation, is divided among them."""
        bench, (cell, length) = self.bench, key
        views = self.views[cell]
        share = 1 / len(bench.prompts)
        for row, (prompt, view) in enumerate(zip(bench.prompts, views, strict=True)):
            ours, rounds = runs[0].tokens[row], runs[0].rounds[row]
            expected = plain[0].tokens[row]
            if len(expected) < 2:
                continue  # the prefill's token ended the text: there is nothing to time
            counts = replay.count([(r.proposed, r.accepted, len(r.tokens)) for r in rounds], length.gamma)
            # Sampling draws other tokens than AR from the same distribution: only greedy compares.
            others = [run.tokens[row] for run in [*runs, *plain] if run.tokens[row] != expected]
            gap = noise = None
            if others and chance.temperature == 0:
                gap, noise = bench.divergence(row, expected, others[0])
            made = make_row(
                "measure",
                make_cell(self.drafter, prompt, cell, length, chance),
                self.drafter,
                prompt,
                counts,
                ours,
                view,
                self.sweep.looping_rate,
            )
            yield made.model_copy(
                update={
                    "prompts_together": len(bench.prompts),
                    "together_with": bench.prompts[0].prompt_id,
                    "target_kv_bytes": bench.kv_bytes[row],
                    "exact": None if chance.temperature else not others,
                    "divergence_gap": gap,
                    "logit_noise": noise,
                    "prefill_s": bench.prefill_s[row] + self.prefill_s[row],
                    "ar_prefill_s": bench.prefill_s[row],
                    "decode_s": [run.seconds * share for run in runs],
                    "ar_decode_s": [run.seconds * share for run in plain],
                    "compile_s": compile_s * share,
                    "ar_num_tokens": len(expected) - 1,
                    "peak_memory_bytes": max(run.peak_memory_bytes for run in runs),
                    "text": self.tokenizer.decode(ours, skip_special_tokens=True),
                }
            )
