"""Measured rows: exact, timed beside autoregressive decoding, and nothing compiled while the clock runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.decode import bench as measure
from pipeline.decode import runner
from pipeline.decode.lean import LeanModel
from pipeline.decode.model import decode_model
from pipeline.metrics import Round
from pipeline.store.files import read_rows
from pipeline.store.rows import FailedCell, PromptRow
from pipeline.sweep.evaluator import Evaluator, failures_of
from pipeline.sweep.grid import Drafter
from pipeline.sweep.measurer import before_divergence
from tests.helpers.sweeps import CPU, LENGTH, LIMIT, SWEEP, SweepBench, key
from tests.helpers.tiny import VOCABULARY, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def measured(bench: SweepBench) -> list[PromptRow]:
    task = bench.measured(bench.folder / "measured")
    assert not failures_of(task).exists()
    return read_rows(task.output, PromptRow)


def test_measured_counts_are_the_replayed_ones(measured: list[PromptRow], replayed: list[PromptRow]) -> None:
    expected = {key(row): row for row in replayed}
    assert len(measured) == 2 * 2 * 2 * 2, "policies × measured budgets × γ × prompts"
    for row in measured:
        same = expected[key(row)]
        assert row.counts == same.counts
        assert (row.repetition_rate, row.drafter_kv_bytes) == (same.repetition_rate, same.drafter_kv_bytes)


def test_measured_rows_are_exact_timed_and_repeated(bench: SweepBench, measured: list[PromptRow]) -> None:
    tokenizer = tiny_tokenizer()
    continuations = {row.prompt_id: row for row in bench.continuations}
    for row in measured:
        assert row.mode == "measure" and row.timing.exact is True
        assert len(row.timing.decode_s) == len(row.timing.ar_decode_s) == 2
        assert min(*row.timing.decode_s, *row.timing.ar_decode_s) > 0
        assert row.timing.prefill_s is not None and row.timing.ar_prefill_s is not None
        assert row.timing.prefill_s > row.timing.ar_prefill_s > 0
        assert row.timing.ar_num_tokens == row.counts.num_tokens == LIMIT - 1
        assert row.timing.target_kv_bytes == LENGTH * 2 * 2 * 12 * 3 * 4
        assert row.timing.peak_memory_bytes is not None and row.timing.peak_memory_bytes > 1e6
        assert row.timing.text == tokenizer.decode(continuations[row.prompt_id].tokens)
    # All cells of a prompt stand beside the same runs of AR.
    assert len({tuple(row.timing.ar_decode_s) for row in measured}) == 2


def test_warm_up_runs_are_thrown_away(
    bench: SweepBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first prompt of a worker is run once more than its repeats, the second is not."""
    runs: list[str] = []
    plain = measure.Bench.autoregressive

    def counted(self: measure.Bench, chance: measure.Chance, eos: frozenset[int]) -> measure.Timed:
        runs.append(self.prompts[0].prompt_id)
        return plain(self, chance, eos)

    monkeypatch.setattr(measure.Bench, "autoregressive", counted)
    evaluator = bench.evaluator()
    tasks = [bench.measure_task(evaluator, tmp_path, at, at + 1) for at in (0, 1)]
    for task in tasks:
        evaluator(task)
    first, second = (prompt.prompt_id for prompt in bench.prompts[:2])
    assert (runs.count(first), runs.count(second)) == (3, 2)
    assert all(
        len(row.timing.ar_decode_s) == 2 for task in tasks for row in read_rows(task.output, PromptRow)
    )


def test_every_second_repeat_goes_backwards_and_a_prefill_is_rehearsed(
    bench: SweepBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autoregressive decoding and two γ, three times over behind a warm-up; both models prefill twice."""
    order: list[int] = []
    prefills: list[str] = []
    plain, ours, prefill = measure.Bench.autoregressive, measure.Bench.speculative, LeanModel.prefill

    def autoregressive(self: measure.Bench, *arguments: Any) -> measure.Timed:
        order.append(0)
        return plain(self, *arguments)

    def speculative(self: measure.Bench, source: Any, gamma: int, *arguments: Any) -> measure.Timed:
        order.append(gamma)
        return ours(self, source, gamma, *arguments)

    def prefilled(self: LeanModel, *arguments: Any) -> Any:
        prefills.append(self.name)
        return prefill(self, *arguments)

    monkeypatch.setattr(measure.Bench, "autoregressive", autoregressive)
    monkeypatch.setattr(measure.Bench, "speculative", speculative)
    monkeypatch.setattr(LeanModel, "prefill", prefilled)
    measured = {"budgets": [16], "gammas": [2, 5], "repeats": 3}
    bench.measured(tmp_path, changes={"sweep.policies": ["streaming"], "sweep.measure": measured}, last=1)
    assert order == [0, 2, 5, 5, 2, 0, 0, 2, 5, 5, 2, 0]
    assert len(prefills) == 4 and all(prefills.count(name) == 2 for name in prefills)


def test_a_target_that_is_its_own_drafter_is_always_accepted(bench: SweepBench, tmp_path: Path) -> None:
    task = bench.measured(tmp_path, ["target"])
    full = [row for row in read_rows(task.output, PromptRow) if row.cell.budget == "full"]
    assert full and all(row.counts.num_accepted == row.counts.num_proposed for row in full)


def test_a_divergence_is_weighed_against_the_noise(bench: SweepBench) -> None:
    """The gap is that of the two best logits of a plain forward; the noise is rounding."""
    prompt, continuation = bench.prompts[0], bench.continuations[0].tokens
    held = measure.Bench(runner.Runners("none"), decode_model(bench.pair[0]), [prompt], 5)
    other = [*continuation[:7], (continuation[7] + 1) % VOCABULARY, *continuation[8:]]
    gap, noise = held.divergence(0, continuation, other)
    with torch.no_grad():
        logits = bench.pair[0](input_ids=torch.tensor([prompt.tokens + continuation[:7]])).logits[0, -1]
    best = logits.topk(2).values
    assert gap == pytest.approx(float(best[0] - best[1]), abs=1e-3)
    assert gap == pytest.approx(bench.continuations[0].gaps[7], abs=1e-3)
    assert 0 <= noise < 1e-3 < gap


def test_rounds_behind_a_divergence_are_left_out() -> None:
    """Autoregressive decoding gives 1 2 3 4 5 6 7 8; the third round differs in its second token."""
    expected = [1, 2, 3, 4, 5, 6, 7, 8]
    rounds = [Round((2, 3), 2, 1), Round((4,), 2, 0), Round((5, 9), 2, 1), Round((7, 8), 2, 1)]
    assert before_divergence(rounds, expected) == rounds[:2]
    same = [*rounds[:2], Round((5, 6), 2, 1), rounds[3]]
    assert before_divergence(same, expected) == same
    # A text that goes on where the other ended differs too.
    assert before_divergence([*same, Round((9,), 1, 0)], expected) == same


def test_a_divergence_leaves_its_tokens_out_of_the_counts_and_in_the_time(
    bench: SweepBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autoregressive decoding made to differ in its tenth token, as rounding may make it."""
    plain = measure.Bench.autoregressive

    def rounded(self: measure.Bench, chance: Any, eos: frozenset[int]) -> measure.Timed:
        run = plain(self, chance, eos)
        run.tokens[0][9] = (run.tokens[0][9] + 1) % VOCABULARY
        return run

    monkeypatch.setattr(measure.Bench, "autoregressive", rounded)
    task = bench.measured(tmp_path, changes={"sweep.measure": {"gammas": [2], "repeats": 1}}, last=1)
    rows = read_rows(task.output, PromptRow)
    assert rows
    for row in rows:
        assert row.timing.exact is False and row.timing.divergence_gap is not None
        assert row.counts.num_tokens + row.num_left_out == LIMIT - 1
        # The first token is the prefill's: at most eight more are the same, less what its round holds.
        assert (
            8 - row.cell.gamma <= row.counts.num_tokens <= 8
            and row.counts.num_rounds == row.counts.reached[0]
        )


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now

    def compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled by its first call, as by torch."""
        calls = itertools.count()

        def run(*arguments: Any) -> Any:
            self.now += 0 if next(calls) else 100
            return step(*arguments)

        return run


def test_compilation_is_in_no_time_and_is_recorded(
    bench: SweepBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two temperatures, two prompts of one shape: each compiles once, outside what is timed.

    On a clock by which a step that is compiled takes 100 s, and everything else next to nothing.
    """
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(runner, "compiled", clock.compiled)
    changes = {
        "decode.compile": "inductor",
        "sweep.temperatures": [0.0, 0.7],
        "sweep.measure": {"gammas": [5], "budgets": [16], "repeats": 2},
    }
    task = bench.measured(tmp_path, changes=changes)
    rows = read_rows(task.output, PromptRow)
    first = [row for row in rows if row.prompt_id == bench.prompts[0].prompt_id]
    compiled = [row.timing.compile_s for row in first if row.timing.compile_s]
    assert len(first) == 4 and len(compiled) == 2, "one cell of each temperature compiles for both policies"
    assert all(row.timing.compile_s == 0 for row in rows if row not in first)
    assert max(max(*row.timing.decode_s, *row.timing.ar_decode_s) for row in rows) < 1 and min(compiled) > 100


def test_prompts_decoded_together_give_the_rows_of_each_alone(bench: SweepBench, tmp_path: Path) -> None:
    """Counts and texts are a prompt's own; what they shared, time, is divided evenly."""
    found = {}
    for together in (1, 3):
        measured = {"gammas": [2], "budgets": [16], "repeats": 2, "prompts_together": together}
        task = bench.measured(tmp_path / str(together), changes={"sweep.measure": measured}, last=3)
        rows = read_rows(task.output, PromptRow)
        assert all(row.timing.exact and row.timing.prompts_together == together for row in rows)
        found[together] = [
            (key(row), row.counts, row.timing.text, row.timing.target_kv_bytes) for row in rows
        ]
        assert len({tuple(row.timing.ar_decode_s) for row in rows}) == 3 // together
    assert sorted(found[1], key=str) == sorted(found[3], key=str) and len(found[1]) == 2 * 3


def test_cascades_together_give_the_rows_of_each_alone_and_of_self_speculation(
    bench: SweepBench, tmp_path: Path
) -> None:
    """Counts, texts and exactness; what is kept is the view of the middle and that of the drafter within."""
    found = {}
    for together in (1, 3):
        changes = SWEEP | {
            "sweep.baselines": ["self_speculation", "cascade"],
            "sweep.cascade": {"drafter": "multi_view", "budget": 24, "gamma": 3},
            "sweep.measure": {"gammas": [5], "repeats": 1, "prompts_together": together, "predict": False},
        }
        target = bench.refs["target"]
        sources = [
            Drafter("self_speculation", target, 128, "self_speculation"),
            Drafter("cascade", target, 128, "cascade", inner=bench.refs["drafter"]),
        ]
        evaluator = Evaluator(tiny_config(changes), target, sources, bench.prepare / "tokenizer", CPU)
        task = bench.measure_task(evaluator, tmp_path / str(together), last=3)
        assert evaluator(task).failed == 0
        rows = read_rows(task.output, PromptRow)
        assert all(row.timing.exact and row.timing.prefill_s > row.timing.ar_prefill_s for row in rows)
        entry = 2 * 2 * 12 * 3 * 4  # of target and drafter alike
        for row in rows:
            inner = 24 * (row.cell.drafter == "cascade")
            assert row.drafter_kv_bytes == (row.cell.budget + inner) * entry
        for name in ("self_speculation", "cascade"):
            found[name, together] = {
                (row.cell.vary(drafter="any"), row.prompt_id): (row.counts, row.timing.text)
                for row in rows
                if row.cell.drafter == name
            }
    assert len(found["cascade", 1]) == 2 * 2 * 3, "policies × sparse budgets × prompts"
    assert all(rows == found["cascade", 1] for rows in found.values())


def test_thresholds_are_an_axis_of_the_measured_cells(bench: SweepBench, tmp_path: Path) -> None:
    changes = {
        "decode.draft_length": "adaptive",
        "sweep.thresholds": [0.0, 0.6],
        "sweep.measure": {"gammas": [5], "budgets": [16], "repeats": 1},
    }
    task = bench.measured(tmp_path, changes=changes)
    rows = {(row.prompt_id, row.cell.threshold): row for row in read_rows(task.output, PromptRow)}
    assert len(rows) == 4 and all(row.timing.exact for row in rows.values())
    for prompt in bench.prompts[:2]:
        fixed, adaptive = rows[prompt.prompt_id, 0.0], rows[prompt.prompt_id, 0.6]
        assert fixed.counts.num_proposed > adaptive.counts.num_proposed >= adaptive.counts.num_rounds
        assert fixed.timing.text == adaptive.timing.text


def test_what_does_not_fit_into_memory_fails_before_it_is_made(
    bench: SweepBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "available_memory", lambda device: 100_000)
    task = bench.measured(tmp_path, changes={"sweep.measure": {"prompts_together": 2}})
    assert read_rows(task.output, PromptRow) == []
    error = read_rows(failures_of(task), FailedCell)[0].error
    assert error.startswith("NotEnoughMemory: decoding 2 prompt(s) of 64 kept entries with ")
    assert "lower sweep.measure.prompts_together, the contexts or data.max_new_tokens" in error


def test_only_the_named_drafters_are_measured(bench: SweepBench, tmp_path: Path) -> None:
    variants = [{"name": name, "steps": 0, "budgets": {16: 1.0}} for name in ("drafter", "poor")]
    changes = {"train.variants": variants, "sweep.measure": {"drafters": ["poor"], "gammas": [5]}}
    task = bench.measured(tmp_path, ["drafter", "poor"], changes)
    rows = read_rows(task.output, PromptRow)
    assert {(row.cell.drafter, row.cell.gamma) for row in rows} == {("poor", 5)}
    assert all(len(row.timing.decode_s) == 3 and row.timing.exact for row in rows)


def test_sampling_repeats_itself_and_claims_no_exactness(bench: SweepBench, tmp_path: Path) -> None:
    changes = {"sweep.temperatures": [0.0, 1.5], "sweep.seeds": [3, 4]}
    changes["sweep.measure"] = {"budgets": [16], "gammas": [2], "repeats": 2}
    runs = []
    for name in ("one", "two"):
        task = bench.measured(tmp_path / name, changes=changes)
        runs.append(read_rows(task.output, PromptRow))
    for row in runs[0]:
        assert (row.timing.exact is None) == (row.cell.temperature > 0)
    # Greedy uses the first seed, sampling all of them.
    assert {(row.cell.temperature, row.cell.seed) for row in runs[0]} == {(0.0, 3), (1.5, 3), (1.5, 4)}
    assert [(key(row), row.counts, row.timing.text) for row in runs[0]] == [
        (key(row), row.counts, row.timing.text) for row in runs[1]
    ]
    assert len({row.timing.text for row in runs[0] if row.cell.temperature > 0}) > 1
