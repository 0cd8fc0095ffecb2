"""The sweep's rows against decoding by hand, its controls, and what a failed cell leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from pipeline import measure, replay
from pipeline.artifacts import read_rows, write_rows
from pipeline.cells import Drafter, Mode
from pipeline.decoding import Round
from pipeline.evaluate import Evaluator, SweepTask
from pipeline.kv import view_of
from pipeline.lean import decode_model
from pipeline.models import ModelRef, load_model
from pipeline.rows import Continuation, FailedCell, Prompt, PromptRow
from pipeline.teacher import ContinueTask, Teacher
from tests.pairs import make_pair, rounds_of, tokens_of
from tests.tiny import VOCABULARY, save_model, tiny_config, tiny_tokenizer, write_prepare

CPU = torch.device("cpu")
PROMPTS, LENGTH, LIMIT = 4, 64, 16
SWEEP: dict[str, Any] = {
    "sweep.mode": "both",
    "sweep.policies": ["chunk_topk", "streaming"],
    "sweep.budgets": [16, 32, "full"],
    "sweep.gammas": [2, 5],
    "sweep.measure": {"budgets": [16, "full"], "prompts": 2, "repeats": 2},
}


class Bench:
    """Prompts, the target's continuations, and drafters on disk."""

    def __init__(self, folder: Path, models: dict[str, PreTrainedModel]) -> None:
        self.folder = folder
        self.refs = {name: save_model(model, folder / name) for name, model in models.items()}
        self.prepare = write_prepare(folder / "prepare", tiny_config(), test_prompts=PROMPTS)
        (self.file,) = (self.prepare / "prompts").glob("test-*.jsonl")
        self.teach = folder / "teach"
        teacher = Teacher(tiny_config(), self.refs["target"], self.prepare / "tokenizer", self.teach, CPU)
        teacher(ContinueTask(self.file))
        self.pair = tuple(load_model(self.refs[name], VOCABULARY) for name in ("target", "drafter"))
        self.prompts = read_rows(self.file, Prompt)
        self.continuations = read_rows(self.teach / "continuations" / self.file.name, Continuation)

    def evaluator(
        self, drafters: Sequence[str] = ("drafter",), changes: dict[str, Any] | None = None
    ) -> Evaluator:
        chosen = [Drafter(name, self.refs[name], 128) for name in drafters]
        config = tiny_config(SWEEP | (changes or {}))
        return Evaluator(config, self.refs["target"], chosen, self.prepare / "tokenizer", CPU)

    def task(self, output: Path, mode: Mode, first: int = 0, last: int = PROMPTS) -> SweepTask:
        continuations = self.teach / "continuations" / self.file.name
        return SweepTask(
            mode, self.file, continuations, first, last, output / "rows" / f"{mode}-{first}.jsonl"
        )

    def speculate(
        self, prompt: Prompt, read: Prompt, policy: str, budget: int | str, gamma: int
    ) -> tuple[list[int], list[Round]]:
        """One greedy cell by hand: the drafter holds a view of the prompt `read`."""
        tokens = [torch.tensor([prompt.tokens])], [torch.tensor([read.tokens])]
        pair = make_pair(*self.pair, tokens[0], view_of(policy, budget), LIMIT + gamma, read=tokens[1])
        rounds = rounds_of(pair, gamma, LIMIT)
        return tokens_of(pair, rounds)[0], rounds[0]


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    make_model: Any,
) -> Bench:
    models = {"target": target, "drafter": drafter, "poor": make_model(layers=1, seed=9)}
    return Bench(tmp_path_factory.mktemp("evaluate"), models)


@pytest.fixture(scope="module")
def replayed(bench: Bench) -> list[PromptRow]:
    task = bench.task(bench.folder / "replayed", "replay")
    assert bench.evaluator()(task)[1] == 0
    return read_rows(task.output, PromptRow)


@pytest.fixture(scope="module")
def measured(bench: Bench) -> list[PromptRow]:
    task = bench.task(bench.folder / "measured", "measure", last=2)
    assert bench.evaluator()(task)[1] == 0
    return read_rows(task.output, PromptRow)


def counts(row: PromptRow) -> tuple[Any, ...]:
    return (row.num_tokens, row.num_rounds, row.num_proposed, row.num_accepted, row.reached, row.kept)


def key(row: PromptRow) -> tuple[Any, ...]:
    return (row.drafter, row.prompt_id, row.policy, row.budget, row.control, row.gamma, row.temperature)


def by_hand(rounds: list[Round], gamma: int) -> tuple[Any, ...]:
    total = replay.count([(one.proposed, one.accepted, len(one.tokens)) for one in rounds], gamma)
    return (
        total.num_tokens, total.num_rounds, total.num_proposed, total.num_accepted,
        list(total.reached), list(total.kept),
    )  # fmt: skip


# ── replay ────────────────────────────────────────────────────────────────────────────────────────


def test_replay_has_every_cell_once(replayed: list[PromptRow]) -> None:
    """2 policies × (3 budgets + 3 with another prompt's KV + none) × 2 γ × 4 prompts."""
    assert len(replayed) == len({key(row) for row in replayed}) == 2 * 7 * 2 * PROMPTS
    assert all(row.mode == "replay" and row.temperature == 0 and not row.decode_s for row in replayed)
    assert {row.control for row in replayed} == {None, "other_prompt", "no_prefix"}
    assert all(row.budget == 0 for row in replayed if row.control == "no_prefix")


def test_replay_counts_are_decodings(bench: Bench, replayed: list[PromptRow]) -> None:
    """First and last prompt, controls included: the partner is the next prompt, for the last the first."""
    following = [*bench.prompts[1:], bench.prompts[0]]
    pairs = {own.prompt_id: (own, other) for own, other in zip(bench.prompts, following, strict=True)}
    for row in replayed:
        if row.prompt_id not in (bench.prompts[0].prompt_id, bench.prompts[-1].prompt_id):
            continue
        prompt, partner = pairs[row.prompt_id]
        read = partner if row.control == "other_prompt" else prompt
        tokens, rounds = bench.speculate(prompt, read, row.policy, row.budget, row.gamma)
        assert counts(row) == by_hand(rounds, row.gamma), key(row)
        stored = next(c for c in bench.continuations if c.prompt_id == row.prompt_id)
        assert tokens == stored.tokens and row.repetition_rate == stored.repetition_rate
        assert row.looping == (row.repetition_rate > 0.5)


def test_another_prompts_kv_is_another_result(replayed: list[PromptRow]) -> None:
    found = {key(row): row.num_accepted for row in replayed}
    own = {k: n for k, n in found.items() if k[4] is None}
    other = {k: found[(*k[:4], "other_prompt", *k[5:])] for k in own}
    assert own != other and sum(own.values()) > sum(other.values())


def test_a_partner_of_the_same_document_is_passed_over(bench: Bench, tmp_path: Path) -> None:
    """Prompts 0 and 1 come from one document: both take prompt 2 as theirs."""
    prompts = [
        prompt.model_copy(update={"document_id": "same"}) if number < 2 else prompt
        for number, prompt in enumerate(bench.prompts)
    ]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    task = replace(bench.task(tmp_path, "replay"), prompts=tmp_path / "prompts.jsonl")
    bench.evaluator()(task)
    (row,) = (
        row
        for row in read_rows(task.output, PromptRow)
        if key(row) == ("drafter", prompts[0].prompt_id, "streaming", 16, "other_prompt", 5, 0.0)
    )
    _, rounds = bench.speculate(prompts[0], prompts[2], "streaming", 16, 5)
    assert counts(row) == by_hand(rounds, 5)


def test_without_a_partner_only_the_control_is_left_out(
    bench: Bench, replayed: list[PromptRow], tmp_path: Path
) -> None:
    prompts = [prompt.model_copy(update={"document_id": "same"}) for prompt in bench.prompts]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    task = replace(bench.task(tmp_path, "replay"), prompts=tmp_path / "prompts.jsonl")
    wanted = [row for row in replayed if row.control != "other_prompt"]
    assert bench.evaluator()(task) == (len(wanted), 0)
    assert [counts(row) for row in read_rows(task.output, PromptRow)] == [counts(row) for row in wanted]


def test_slices_of_the_prompts_give_the_same_rows(
    bench: Bench, replayed: list[PromptRow], tmp_path: Path
) -> None:
    evaluator, rows = bench.evaluator(), []
    for first, last in ((2, 4), (0, 2)):
        task = bench.task(tmp_path, "replay", first, last)
        evaluator(task)
        rows += read_rows(task.output, PromptRow)
    assert sorted(map(key, rows), key=str) == sorted(map(key, replayed), key=str)
    found = {key(row): row for row in rows}
    assert all(found[key(row)] == row for row in replayed)


def test_kv_bytes_and_positions(replayed: list[PromptRow]) -> None:
    """Keys and values × 2 key/value heads × 12 wide × 3 layers × 4 bytes for each kept entry."""
    for row in replayed:
        kept = LENGTH if row.budget == "full" else row.budget
        assert row.drafter_kv_bytes == kept * 2 * 2 * 12 * 3 * 4
        assert row.in_trained_range


@pytest.mark.parametrize(("trained", "inside"), [(LENGTH + LIMIT, True), (LENGTH + LIMIT - 1, False)])
def test_the_trained_range_counts_prompt_and_continuation(
    bench: Bench, tmp_path: Path, trained: int, inside: bool
) -> None:
    evaluator = bench.evaluator()
    evaluator.drafters = [(replace(d, trained_positions=trained), *pair) for d, *pair in evaluator.drafters]
    task = bench.task(tmp_path, "replay", 0, 1)
    evaluator(task)
    assert {row.in_trained_range for row in read_rows(task.output, PromptRow)} == {inside}


def test_a_continuation_that_ends_at_once_gives_no_rows(bench: Bench, tmp_path: Path) -> None:
    short = bench.continuations[0]
    cut = short.model_copy(update={"tokens": short.tokens[:1], "gaps": short.gaps[:1], "eos_at": 0})
    write_rows(tmp_path / "c.jsonl", [cut, *bench.continuations[1:]])
    task = replace(bench.task(tmp_path, "replay", 0, 2), continuations=tmp_path / "c.jsonl")
    assert bench.evaluator()(task) == (2 * 7 * 2, 0)
    assert {row.prompt_id for row in read_rows(task.output, PromptRow)} == {bench.prompts[1].prompt_id}


# ── measure ───────────────────────────────────────────────────────────────────────────────────────


def test_measured_counts_are_the_replayed_ones(measured: list[PromptRow], replayed: list[PromptRow]) -> None:
    expected = {key(row): row for row in replayed}
    assert len(measured) == 2 * 2 * 2 * 2, "policies × measured budgets × γ × prompts"
    for row in measured:
        same = expected[key(row)]
        assert counts(row) == counts(same)
        assert (row.repetition_rate, row.drafter_kv_bytes) == (same.repetition_rate, same.drafter_kv_bytes)


def test_measured_rows_are_exact_timed_and_repeated(bench: Bench, measured: list[PromptRow]) -> None:
    tokenizer = tiny_tokenizer()
    continuations = {row.prompt_id: row for row in bench.continuations}
    for row in measured:
        assert row.mode == "measure" and row.exact is True
        assert len(row.decode_s) == len(row.ar_decode_s) == 2
        assert min(*row.decode_s, *row.ar_decode_s) > 0
        assert row.prefill_s is not None and row.ar_prefill_s is not None
        assert row.prefill_s > row.ar_prefill_s > 0
        assert row.ar_num_tokens == row.num_tokens == LIMIT - 1
        assert row.target_kv_bytes == LENGTH * 2 * 2 * 12 * 3 * 4
        assert row.peak_memory_bytes is not None and row.peak_memory_bytes > 1e6
        assert row.text == tokenizer.decode(continuations[row.prompt_id].tokens)
    # All cells of a prompt stand beside the same runs of AR.
    assert len({tuple(row.ar_decode_s) for row in measured}) == 2


def test_warm_up_runs_are_thrown_away(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prompt of a worker is run once more than its repeats, the second is not."""
    runs: list[str] = []
    plain = measure.Bench.autoregressive

    def counted(self: measure.Bench, chance: measure.Chance, eos: frozenset[int]) -> measure.Timed:
        runs.append(self.prompts[0].prompt_id)
        return plain(self, chance, eos)

    monkeypatch.setattr(measure.Bench, "autoregressive", counted)
    evaluator = bench.evaluator()
    tasks = [bench.task(tmp_path, "measure", at, at + 1) for at in (0, 1)]
    for task in tasks:
        evaluator(task)
    first, second = (prompt.prompt_id for prompt in bench.prompts[:2])
    assert (runs.count(first), runs.count(second)) == (3, 2)
    assert all(len(row.ar_decode_s) == 2 for task in tasks for row in read_rows(task.output, PromptRow))


def test_a_target_that_is_its_own_drafter_is_always_accepted(bench: Bench, tmp_path: Path) -> None:
    task = bench.task(tmp_path, "measure", last=2)
    bench.evaluator(["target"])(task)
    full = [row for row in read_rows(task.output, PromptRow) if row.budget == "full"]
    assert full and all(row.num_accepted == row.num_proposed for row in full)


def test_a_divergence_is_weighed_against_the_noise(bench: Bench) -> None:
    """The gap is that of the two best logits of a plain forward; the noise is rounding."""
    prompt, continuation = bench.prompts[0], bench.continuations[0].tokens
    held = measure.Bench(measure.Sides("none"), decode_model(bench.pair[0]), [prompt], 5)
    other = [*continuation[:7], (continuation[7] + 1) % VOCABULARY, *continuation[8:]]
    gap, noise = held.divergence(0, continuation, other)
    with torch.no_grad():
        logits = bench.pair[0](input_ids=torch.tensor([prompt.tokens + continuation[:7]])).logits[0, -1]
    best = logits.topk(2).values
    assert gap == pytest.approx(float(best[0] - best[1]), abs=1e-3)
    assert gap == pytest.approx(bench.continuations[0].gaps[7], abs=1e-3)
    assert 0 <= noise < 1e-3 < gap


def test_compilation_is_in_no_time_and_is_recorded(bench: Bench, tmp_path: Path) -> None:
    """Two temperatures, two prompts of one shape: each compiles once, outside what is timed."""
    torch._dynamo.reset()
    changes = {
        "decode.compile": "inductor",
        "sweep.temperatures": [0.0, 0.7],
        "sweep.measure": {"gammas": [5], "budgets": [16], "repeats": 2},
    }
    task = bench.task(tmp_path, "measure", last=2)
    bench.evaluator(changes=changes)(task)
    rows = read_rows(task.output, PromptRow)
    first = [row for row in rows if row.prompt_id == bench.prompts[0].prompt_id]
    compiled = [row.compile_s for row in first if row.compile_s]
    assert len(first) == 4 and len(compiled) == 2, "one cell of each temperature compiles for both policies"
    assert all(row.compile_s == 0 for row in rows if row not in first)
    assert max(max(*row.decode_s, *row.ar_decode_s) for row in rows) < 0.5 < min(compiled)


def test_prompts_decoded_together_give_the_rows_of_each_alone(bench: Bench, tmp_path: Path) -> None:
    """Counts and texts are a prompt's own; what they shared, time, is divided evenly."""
    found = {}
    for together in (1, 3):
        measured = {"gammas": [2], "budgets": [16], "repeats": 2, "prompts_together": together}
        task = bench.task(tmp_path / str(together), "measure", last=3)
        bench.evaluator(changes={"sweep.measure": measured})(task)
        rows = read_rows(task.output, PromptRow)
        assert all(row.exact and row.prompts_together == together for row in rows)
        found[together] = [(key(row), counts(row), row.text, row.target_kv_bytes) for row in rows]
        assert len({tuple(row.ar_decode_s) for row in rows}) == 3 // together
    assert sorted(found[1]) == sorted(found[3]) and len(found[1]) == 2 * 3


def test_thresholds_are_an_axis_of_the_measured_cells(bench: Bench, tmp_path: Path) -> None:
    changes = {
        "decode.draft_length": "adaptive",
        "sweep.thresholds": [0.0, 0.6],
        "sweep.measure": {"gammas": [5], "budgets": [16], "repeats": 1},
    }
    task = bench.task(tmp_path, "measure", last=2)
    bench.evaluator(changes=changes)(task)
    rows = {(row.prompt_id, row.threshold): row for row in read_rows(task.output, PromptRow)}
    assert len(rows) == 4 and all(row.exact for row in rows.values())
    for prompt in bench.prompts[:2]:
        fixed, adaptive = rows[prompt.prompt_id, 0.0], rows[prompt.prompt_id, 0.6]
        assert fixed.num_proposed > adaptive.num_proposed >= adaptive.num_rounds
        assert fixed.text == adaptive.text


def test_what_does_not_fit_into_memory_fails_before_it_is_made(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "available_memory", lambda device: 100_000)
    task = bench.task(tmp_path, "measure", last=2)
    changes = {"sweep.measure": {"prompts_together": 2}}
    assert bench.evaluator(changes=changes)(task) == (0, 2)
    error = read_rows(task.failures, FailedCell)[0].error
    assert error.startswith("NotEnoughMemory: decoding 2 prompt(s) of 64 kept entries with ")
    assert "lower sweep.measure.prompts_together, the contexts or data.max_new_tokens" in error


def test_only_the_named_drafters_are_measured(bench: Bench, tmp_path: Path) -> None:
    variants = [{"name": name, "steps": 0, "budgets": {16: 1.0}} for name in ("drafter", "poor")]
    changes = {"train.variants": variants, "sweep.measure": {"drafters": ["poor"], "gammas": [5]}}
    task = bench.task(tmp_path, "measure", last=2)
    bench.evaluator(["drafter", "poor"], changes)(task)
    rows = read_rows(task.output, PromptRow)
    assert {(row.drafter, row.gamma) for row in rows} == {("poor", 5)}
    assert all(len(row.decode_s) == 3 and row.exact for row in rows)


def test_sampling_repeats_itself_and_claims_no_exactness(bench: Bench, tmp_path: Path) -> None:
    changes = {"sweep.temperatures": [0.0, 1.5], "sweep.seeds": [3, 4]}
    changes["sweep.measure"] = {"budgets": [16], "gammas": [2], "repeats": 2}
    runs = []
    for name in ("one", "two"):
        task = bench.task(tmp_path / name, "measure", last=2)
        bench.evaluator(changes=changes)(task)
        runs.append(read_rows(task.output, PromptRow))
    for row in runs[0]:
        assert (row.exact is None) == (row.temperature > 0)
    # Greedy uses the first seed, sampling all of them.
    assert {(row.temperature, row.seed) for row in runs[0]} == {(0.0, 3), (1.5, 3), (1.5, 4)}
    assert [(key(row), row.seed, counts(row), row.text) for row in runs[0]] == [
        (key(row), row.seed, counts(row), row.text) for row in runs[1]
    ]
    assert len({row.text for row in runs[0] if row.temperature > 0}) > 1


# ── what fails, and what is there ─────────────────────────────────────────────────────────────────


def without_norm(bench: Bench, folder: Path) -> ModelRef:
    """The drafter with NaN in its last norm."""
    model = load_model(bench.refs["drafter"], VOCABULARY)
    model.model.norm.weight.data.fill_(float("nan"))
    return save_model(model, folder)


@pytest.mark.parametrize(("mode", "last"), [("replay", PROMPTS), ("measure", 3)])
def test_a_failed_drafter_leaves_the_others_and_is_made_up_for(
    bench: Bench, tmp_path: Path, mode: Mode, last: int
) -> None:
    names, changes = ["drafter", "poor"], {"sweep.measure": {"gammas": [2], "budgets": [16], "repeats": 1}}
    whole = bench.task(tmp_path / "whole", mode, last=last)
    rows, failed = bench.evaluator(names, changes)(whole)
    assert rows > 0 and failed == 0 and not whole.failures.exists()

    broken = without_norm(bench, tmp_path / "broken")
    evaluator = bench.evaluator(names, changes)
    evaluator.drafters[0] = (evaluator.drafters[0][0], *evaluator.load(broken))
    task = bench.task(tmp_path / "again", mode, last=last)
    views = 2 * 7 if mode == "replay" else 2  # each of them is named
    assert evaluator(task) == (rows // 2, views * last)
    assert {row.drafter for row in read_rows(task.output, PromptRow)} == {"poor"}
    failures = read_rows(task.failures, FailedCell)
    assert {row.prompt_id for row in failures} == {prompt.prompt_id for prompt in bench.prompts[:last]}
    assert len({(row.policy, row.budget, row.control) for row in failures}) == views
    for row in failures:
        assert (row.drafter, row.mode, row.gamma) == ("drafter", mode, 0 if mode == "replay" else 2)
        assert row.error.startswith("NotFinite:")

    assert bench.evaluator(names, changes)(task) == (rows, 0)
    assert not task.failures.exists()
    ours, theirs = (
        [(key(row), counts(row), row.exact) for row in read_rows(one.output, PromptRow)]
        for one in (task, whole)
    )
    assert ours == theirs


def test_a_run_that_breaks_off_does_not_disturb_the_next_drafter(
    bench: Bench, target: PreTrainedModel, tmp_path: Path
) -> None:
    """This drafter fails after some rounds, when the target's cache already holds continuation tokens: the
    embedding of a token that the continuation brings, and no prompt has, is NaN."""
    prompt, continuation = bench.prompts[1], bench.continuations[1]
    known = {token for p in bench.prompts[:2] for token in p.tokens} | set(bench.continuations[0].tokens)
    late = [
        token
        for place, token in enumerate(continuation.tokens)
        if place > 2 and token not in known | set(continuation.tokens[:place])
    ]
    if not late:
        pytest.skip("this random continuation brings no new token")
    config = AutoConfig.from_pretrained(bench.refs["drafter"].path, tie_word_embeddings=False)
    model, state = LlamaForCausalLM(config), load_model(bench.refs["drafter"], VOCABULARY).state_dict()
    embedding = state["model.embed_tokens.weight"]
    model.load_state_dict(state | {"lm_head.weight": embedding.clone()})
    model.model.embed_tokens.weight.data[late[0]] = float("nan")
    evaluator = bench.evaluator(["poor", "drafter"])
    broken = evaluator.load(save_model(model, tmp_path / "late"))
    evaluator.drafters[0] = (evaluator.drafters[0][0], *broken)
    task = bench.task(tmp_path, "measure", last=2)
    rows, failed = evaluator(task)
    assert failed >= 1 and rows == 16 + 8, "both prompts of one drafter, the first of the other"
    assert [row.prompt_id for row in read_rows(task.failures, FailedCell)][-1] == prompt.prompt_id
    written = read_rows(task.output, PromptRow)
    assert all(row.exact for row in written)
    assert {row.drafter for row in written if row.prompt_id == prompt.prompt_id} == {"drafter"}


def test_rows_that_are_there_are_not_redone(
    bench: Bench, replayed: list[PromptRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = bench.evaluator()
    monkeypatch.setattr(evaluator, "replay", None)
    assert evaluator(bench.task(bench.folder / "replayed", "replay")) == (len(replayed), 0)
