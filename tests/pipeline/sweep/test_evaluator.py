"""The sweep's rows against decoding by hand, its controls, and what a failed cell leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.axes import Cell, View
from pipeline.metrics import Counts
from pipeline.models.load import ModelRef, load_model
from pipeline.observe.events import Evaluated
from pipeline.store.files import read_rows, write_rows
from pipeline.store.rows import FailedCell, Mode, PromptRow
from pipeline.sweep.evaluator import Evaluator, MeasureTask, ReplayTask, failures_of
from tests.helpers.sweeps import LENGTH, LIMIT, PROMPTS, SweepBench, key
from tests.helpers.tiny import VOCABULARY, save_model


def counted(done: Evaluated) -> tuple[int, int]:
    assert done.cells == done.rows
    return done.rows, done.failed


# ── replay ────────────────────────────────────────────────────────────────────────────────────────


def test_replay_has_every_cell_once(replayed: list[PromptRow]) -> None:
    """2 policies × (3 budgets + 3 with another prompt's KV + none) × 2 γ × 4 prompts."""
    assert len(replayed) == len({key(row) for row in replayed}) == 2 * 7 * 2 * PROMPTS
    assert all(row.mode == "replay" and row.cell.temperature == 0 and row.timing is None for row in replayed)
    assert {row.cell.control for row in replayed} == {None, "other_prompt", "no_prefix"}
    assert all(row.cell.budget == 0 for row in replayed if row.cell.control == "no_prefix")


def test_replay_counts_are_decodings(bench: SweepBench, replayed: list[PromptRow]) -> None:
    """First and last prompt, controls included: the partner is the next prompt, for the last the first."""
    following = [*bench.prompts[1:], bench.prompts[0]]
    pairs = {own.prompt_id: (own, other) for own, other in zip(bench.prompts, following, strict=True)}
    for row in replayed:
        if row.prompt_id not in (bench.prompts[0].prompt_id, bench.prompts[-1].prompt_id):
            continue
        prompt, partner = pairs[row.prompt_id]
        read = partner if row.cell.control == "other_prompt" else prompt
        tokens, rounds = bench.speculate(prompt, read, row.cell.policy, row.cell.budget, row.cell.gamma)
        assert row.counts == Counts.of(rounds, row.cell.gamma), key(row)
        stored = next(c for c in bench.continuations if c.prompt_id == row.prompt_id)
        assert tokens == stored.tokens and row.repetition_rate == stored.repetition_rate
        assert row.looping == (row.repetition_rate > 0.5)


def test_another_prompts_kv_is_another_result(replayed: list[PromptRow]) -> None:
    found = {key(row): row.counts.num_accepted for row in replayed}
    own = {at: n for at, n in found.items() if at[1].control is None}
    other = {(prompt, cell): found[prompt, cell.vary(control="other_prompt")] for prompt, cell in own}
    assert own != other and sum(own.values()) > sum(other.values())


def test_a_partner_of_the_same_document_is_passed_over(bench: SweepBench, tmp_path: Path) -> None:
    """Prompts 0 and 1 come from one document: both take prompt 2 as theirs."""
    prompts = [
        prompt.model_copy(update={"document_id": "same"}) if number < 2 else prompt
        for number, prompt in enumerate(bench.prompts)
    ]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    task = replace(bench.replay_task(tmp_path), prompts=tmp_path / "prompts.jsonl")
    bench.evaluator()(task)
    view = View("streaming", 16, "other_prompt")
    wanted = prompts[0].prompt_id, Cell("drafter", prompts[0].dataset, prompts[0].context, view, gamma=5)
    (row,) = (row for row in read_rows(task.output, PromptRow) if key(row) == wanted)
    _, rounds = bench.speculate(prompts[0], prompts[2], "streaming", 16, 5)
    assert row.counts == Counts.of(rounds, 5)


def test_a_longer_partner_is_cut_to_the_length_of_the_prompt(
    bench: SweepBench, replayed: list[PromptRow], tmp_path: Path
) -> None:
    """The first prompt's rows stay what they were; the second, now the longest, has no partner."""
    first, second, *others = bench.prompts
    longer = second.model_copy(update={"tokens": [*second.tokens, *first.tokens[:7]]})
    write_rows(tmp_path / "prompts.jsonl", [first, longer, *others])
    task = replace(bench.replay_task(tmp_path), prompts=tmp_path / "prompts.jsonl")
    bench.evaluator()(task)
    rows = read_rows(task.output, PromptRow)
    of_first = [row.counts for row in rows if row.prompt_id == first.prompt_id]
    assert of_first == [row.counts for row in replayed if row.prompt_id == first.prompt_id]
    controls = {row.cell.control for row in rows if row.prompt_id == second.prompt_id}
    assert controls == {None, "no_prefix"}


def test_without_a_partner_only_the_control_is_left_out(
    bench: SweepBench, replayed: list[PromptRow], tmp_path: Path
) -> None:
    prompts = [prompt.model_copy(update={"document_id": "same"}) for prompt in bench.prompts]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    task = replace(bench.replay_task(tmp_path), prompts=tmp_path / "prompts.jsonl")
    wanted = [row for row in replayed if row.cell.control != "other_prompt"]
    assert counted(bench.evaluator()(task)) == (len(wanted), 0)
    assert [row.counts for row in read_rows(task.output, PromptRow)] == [row.counts for row in wanted]


def test_slices_of_the_prompts_give_the_same_rows(
    bench: SweepBench, replayed: list[PromptRow], tmp_path: Path
) -> None:
    evaluator, rows = bench.evaluator(), []
    for first, last in ((2, 4), (0, 2)):
        task = bench.replay_task(tmp_path, first, last)
        evaluator(task)
        rows += read_rows(task.output, PromptRow)
    assert sorted(map(key, rows), key=str) == sorted(map(key, replayed), key=str)
    found = {key(row): row for row in rows}
    assert all(found[key(row)] == row for row in replayed)


def test_kv_bytes_and_positions(replayed: list[PromptRow]) -> None:
    """Keys and values × 2 key/value heads × 12 wide × 3 layers × 4 bytes for each kept entry."""
    for row in replayed:
        kept = LENGTH if row.cell.budget == "full" else row.cell.budget
        assert row.drafter_kv_bytes == kept * 2 * 2 * 12 * 3 * 4
        assert row.in_trained_range


@pytest.mark.parametrize(("trained", "inside"), [(LENGTH + LIMIT, True), (LENGTH + LIMIT - 1, False)])
def test_the_trained_range_counts_prompt_and_continuation(
    bench: SweepBench, tmp_path: Path, trained: int, inside: bool
) -> None:
    evaluator = bench.evaluator()
    for one in evaluator.contenders:
        one.drafter = replace(one.drafter, trained_positions=trained)
    task = bench.replay_task(tmp_path, 0, 1)
    evaluator(task)
    assert {row.in_trained_range for row in read_rows(task.output, PromptRow)} == {inside}


def test_a_continuation_that_ends_at_once_gives_no_rows(bench: SweepBench, tmp_path: Path) -> None:
    short = bench.continuations[0]
    cut = short.model_copy(update={"tokens": short.tokens[:1], "gaps": short.gaps[:1], "eos_at": 0})
    write_rows(tmp_path / "c.jsonl", [cut, *bench.continuations[1:]])
    task = replace(bench.replay_task(tmp_path, 0, 2), continuations=(tmp_path / "c.jsonl",))
    assert counted(bench.evaluator()(task)) == (2 * 7 * 2, 0)
    assert {row.prompt_id for row in read_rows(task.output, PromptRow)} == {bench.prompts[1].prompt_id}


# ── what fails, and what is there ─────────────────────────────────────────────────────────────────


def without_norm(bench: SweepBench, folder: Path) -> ModelRef:
    """The drafter with NaN in its last norm."""
    model = load_model(bench.refs["drafter"], VOCABULARY)
    model.model.norm.weight.data.fill_(float("nan"))
    return save_model(model, folder)


@pytest.mark.parametrize(("mode", "last"), [("replay", PROMPTS), ("measure", 3)])
def test_a_failed_drafter_leaves_the_others_and_is_made_up_for(
    bench: SweepBench, tmp_path: Path, mode: Mode, last: int
) -> None:
    names, changes = ["drafter", "poor"], {"sweep.measure": {"gammas": [2], "budgets": [16], "repeats": 1}}

    def task_of(evaluator: Evaluator, name: str) -> ReplayTask | MeasureTask:
        if mode == "replay":
            return bench.replay_task(tmp_path / name, last=last)
        return bench.measure_task(evaluator, tmp_path / name, last=last)

    sound = bench.evaluator(names, changes)
    whole = task_of(sound, "whole")
    rows, failed = counted(sound(whole))
    assert rows > 0 and failed == 0 and not failures_of(whole).exists()

    broken = without_norm(bench, tmp_path / "broken")
    evaluator = bench.evaluator(names, changes)
    first = evaluator.contenders[0]
    first.model, first.fast = evaluator.load(broken)
    task = task_of(evaluator, "again")
    views = 2 * 7 if mode == "replay" else 2  # each of them is named
    assert counted(evaluator(task)) == (rows // 2, views * last)
    assert {row.cell.drafter for row in read_rows(task.output, PromptRow)} == {"poor"}
    failures = read_rows(failures_of(task), FailedCell)
    assert {row.prompt_id for row in failures} == {prompt.prompt_id for prompt in bench.prompts[:last]}
    assert len({(row.cell.policy, row.cell.budget, row.cell.control) for row in failures}) == views
    for row in failures:
        assert (row.cell.drafter, row.mode, row.cell.gamma) == ("drafter", mode, 0 if mode == "replay" else 2)
        assert row.error.startswith("NotFinite:")

    again = bench.evaluator(names, changes)(task)
    assert counted(again) == (rows, 0) and again.retried == views * last
    assert not failures_of(task).exists()
    ours, theirs = (
        [(key(row), row.counts, row.timing and row.timing.exact) for row in read_rows(one.output, PromptRow)]
        for one in (task, whole)
    )
    assert ours == theirs


def test_a_run_that_breaks_off_does_not_disturb_the_next_drafter(
    bench: SweepBench, target: PreTrainedModel, tmp_path: Path
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
    first = evaluator.contenders[0]
    first.model, first.fast = evaluator.load(save_model(model, tmp_path / "late"))
    task = bench.measure_task(evaluator, tmp_path, last=2)
    rows, failed = counted(evaluator(task))
    assert failed >= 1 and rows == 16 + 8, "both prompts of one drafter, the first of the other"
    assert [row.prompt_id for row in read_rows(failures_of(task), FailedCell)][-1] == prompt.prompt_id
    written = read_rows(task.output, PromptRow)
    assert all(row.timing.exact for row in written)
    assert {row.cell.drafter for row in written if row.prompt_id == prompt.prompt_id} == {"drafter"}


def test_rows_that_are_there_are_not_redone(
    bench: SweepBench, replayed: list[PromptRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = bench.evaluator()
    monkeypatch.setattr(evaluator, "replay", None)
    assert counted(evaluator(bench.replay_task(bench.folder / "replayed"))) == (len(replayed), 0)


def test_a_task_tells_what_it_gave_first_and_again(bench: SweepBench, tmp_path: Path) -> None:
    """Acceptance over both drafters' real prefixes, and the tokens that were on the clock, by its files."""
    evaluator = bench.evaluator(["drafter", "poor"])
    for task in (bench.replay_task(tmp_path), bench.measure_task(evaluator, tmp_path, last=2)):
        done = evaluator(task)
        rows = [json.loads(line) for line in task.output.read_text().splitlines()]
        assert (done.rows, done.cells, done.failed, done.retried) == (len(rows), len(rows), 0, 0)
        assert set(done.accepted) == {("drafter", "code"), ("poor", "code")}
        for (drafter, _), (accepted, proposed) in done.accepted.items():
            real = [row for row in rows if row["cell"]["drafter"] == drafter]
            real = [row["counts"] for row in real if row["cell"]["view"]["control"] is None]
            assert accepted == sum(sum(counts["kept"]) for counts in real)
            assert proposed == sum(counts["num_proposed"] for counts in real) > 0
        clocked = [row for row in rows if row["mode"] == "measure"]
        assert done.tokens == sum(2 * row["counts"]["num_tokens"] for row in clocked)  # two repeats
        assert done.seconds == pytest.approx(sum(sum(row["timing"]["decode_s"]) for row in clocked))
        assert evaluator(task) == done
