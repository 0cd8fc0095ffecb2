"""A server checked against what replay promised, and servers that misbehave."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.commands.check_server import promises_of, served_view
from jobs.registry import served, versions
from jobs.registry.served import must_be_of
from jobs.registry.versions import Version
from pipeline.axes import FULL, View
from pipeline.errors import BadData, Incomplete
from pipeline.gate.evidence import Results, open_results
from pipeline.serving import client
from pipeline.serving.client import Server
from pipeline.serving.judged import ServerCheck, judge
from pipeline.serving.served import Promise, ask
from tests.helpers.fake_server import Drafts, Fake, serving
from tests.helpers.toys import artifact

GAMMA, MANY = 2, 8  # as many prompts of a place as the command takes
Making = Callable[..., Fake]


@pytest.fixture(scope="module")
def results(finished: Path) -> Results:
    return open_results(artifact(finished, "report"))


@pytest.fixture(scope="module")
def promises(results: Results) -> list[Promise]:
    return promises_of(results, FULL, GAMMA, MANY)


@pytest.fixture
def fake(promises: list[Promise]) -> Making:
    """A server that does what was promised.

    Or `worse`: so many acceptances fewer at the first position; or one that drafts another number a round.
    """
    known = {tuple(promise.prompt.tokens): promise for promise in promises}

    def make(worse: int = 0, drafted: int = GAMMA, **changes: object) -> Fake:
        def drafts(prompt: list[int]) -> Drafts:
            counts = known[tuple(prompt)].row.counts
            first, *others = (int(count) for count in counts.kept)
            fewer = max(first - worse, max(others, default=0))
            rounds = int(counts.num_rounds)
            return rounds, drafted * rounds, [fewer, *others]

        return Fake(lambda prompt: known[tuple(prompt)].text.tokens, drafts, **changes)  # type: ignore[arg-type]

    return make


def check(fake: Fake, results: Results, output: Path, *more: str) -> tuple[int, ServerCheck, str]:
    with serving(fake) as server:
        arguments = ["check-server", server.url, "--results", str(results.report.path), "--gamma", str(GAMMA)]
        done = CliRunner().invoke(app, [*arguments, "--output", str(output), *more], prog_name="budgetdraft")
    assert (output / "check.json").exists(), done.output
    return done.exit_code, ServerCheck.model_validate_json((output / "check.json").read_text()), done.output


@pytest.mark.parametrize("tells", ["request", "metrics"])
def test_a_server_that_keeps_the_promise_passes(
    fake: Making, results: Results, promises: list[Promise], tmp_path: Path, tells: str
) -> None:
    code, said, output = check(fake(tells=tells), results, tmp_path)
    assert (code, said.verdict) == (0, "pass"), output
    assert said.difference and (said.difference.low, said.difference.high) == (0, 0)
    assert said.served == said.replayed and len(said.prompts) == len(promises)
    assert {prompt.told_by for prompt in said.prompts} == {tells}
    assert all(prompt.parts_at is None for prompt in said.prompts)
    rounds = sum(promise.row.counts.num_rounds for promise in promises)
    kept = [sum(promise.row.counts.kept[at] for promise in promises) for at in range(GAMMA)]
    assert [p.served.mean for p in said.by_position] == pytest.approx([count / rounds for count in kept])
    page = (tmp_path / "check.md").read_text()
    assert page.startswith("## Server: pass") and f"{len(promises)} of {len(promises)} texts" in page
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_that_accepts_less_fails(fake: Making, results: Results, tmp_path: Path) -> None:
    code, said, output = check(fake(worse=6), results, tmp_path)
    assert (code, said.verdict) == (5, "fail"), output
    assert said.difference and said.difference.high < -0.02


def test_a_margin_that_the_interval_straddles_decides_nothing(
    fake: Making, results: Results, tmp_path: Path
) -> None:
    _, first, _ = check(fake(worse=2), results, tmp_path)
    assert first.difference and first.difference.low < first.difference.high
    between = -(first.difference.low + first.difference.high) / 2
    code, said, _ = check(fake(worse=2), results, tmp_path, "--margin", str(between))
    assert (code, said.verdict) == (6, "not_enough_evidence")


@pytest.mark.parametrize(
    ("tells", "why"),
    [
        ("nothing", "there is no metrics page with counters, and answers tell nothing of drafts"),
        ("page", "there is no metrics page with counters, and answers tell nothing of drafts"),
        ("", "the metrics page has no counters of drafts"),
    ],
)
def test_without_counts_there_is_no_evidence(
    fake: Making, results: Results, tmp_path: Path, tells: str, why: str
) -> None:
    code, said, _ = check(fake(tells=tells), results, tmp_path)
    assert code == 6 and any(why in reason for reason in said.reasons)
    assert said.tokens_per_s and not said.by_position and not (tmp_path / "check.png").exists()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("restart", "the server's counters restarted"),
        ("traffic", "other requests were on the same counters"),
        ("behind", "the counters were behind for 0.2 s"),
    ],
)
def test_a_prompt_whose_counters_tell_of_something_else_is_left_out_and_named(
    fake: Making,
    results: Results,
    promises: list[Promise],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    why: str,
) -> None:
    monkeypatch.setattr(client, "SETTLED_S", 0.2)
    _, said, _ = check(fake(tells="metrics", fault=fault, only=1), results, tmp_path)
    assert [prompt.note for prompt in said.prompts].count(why) == 1 and said.prompts[1].note == why
    assert not said.prompts[1].told_by
    assert f"1 of {len(promises)} prompts tell nothing of drafts: {why}" in said.reasons
    assert said.difference and said.difference.mean == 0, "the others are as promised"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("refuse", r"answers 400: .*longer than the model can take"),
        ("cut", r"did not come to its end|was cut off"),
        ("hang", r"did not come to its end|took more than"),
        (
            "other_tokenizer",
            r"read \d+ tokens of a prompt of \d+: it does not take token ids",
        ),
    ],
)
def test_a_prompt_without_an_answer_is_named_and_the_others_count(
    fake: Making, results: Results, tmp_path: Path, fault: str, why: str
) -> None:
    code, said, _ = check(fake(fault=fault, only=1), results, tmp_path, "--limit", "2")
    assert code == 6, "not every prompt has an answer"
    failed = [prompt for prompt in said.prompts if prompt.failed]
    assert [prompt.prompt_id for prompt in failed] == [said.prompts[1].prompt_id]
    assert re.search(why, failed[0].failed), failed[0].failed
    assert said.difference and said.difference.mean == 0


@pytest.mark.parametrize(("gap", "verdict"), [(0.5, "fail"), (0.05, "pass")])
def test_a_text_that_parts_fails_but_for_a_tie(
    promises: list[Promise], fake: Making, gap: float, verdict: str
) -> None:
    """Rounds of a text that is not the target's count towards nothing."""
    told = []
    with serving(fake()) as server:
        for number, promise in enumerate(promises):
            begun, gaps = promise.text.tokens[:3], [*promise.text.gaps[:3], gap]
            other = promise.text.model_copy(update={"tokens": [*begun, 1, 1, 1], "gaps": gaps})
            given = replace(promise, text=other) if number == 0 else promise
            told.append(ask(given, Server(server.url), None))
    assert (told[0].parts_at, told[0].gap) == (3, gap)
    said, reasons = judge(told, GAMMA, 0.02, 5)
    assert said == verdict
    named = f"parts from it at token 3, where its two best logits are {gap:.2g} apart"
    assert any(named in reason for reason in reasons) == (verdict == "fail")
    assert any("1 part from it where" in reason for reason in reasons) == (verdict == "pass")
    over = len({one.document_id for one in (told[1:] if verdict == "fail" else told)})
    assert f"over {over} documents" in reasons[0]


def test_a_text_that_ends_elsewhere_is_no_pass(promises: list[Promise], fake: Making) -> None:
    told = []
    with serving(fake()) as server:
        for number, promise in enumerate(promises):
            shorter = promise.text.model_copy(update={"tokens": promise.text.tokens[:3]})
            told.append(
                ask(replace(promise, text=shorter) if number == 0 else promise, Server(server.url), None)
            )
    assert (told[0].parts_at, told[0].gap) == (3, None)
    assert judge(told, GAMMA, 0.02, 5)[0] == "not_enough_evidence"


def test_text_alone_is_compared_where_there_are_no_ids(fake: Making, promises: list[Promise]) -> None:
    promise = promises[0]
    spelled = "".join(f" {token}" for token in promise.text.tokens)
    with serving(fake(fault="no_ids")) as server:
        same = replace(promise, text=promise.text.model_copy(update={"text": spelled}))
        assert ask(same, Server(server.url), None).parts_at is None
        assert ask(promise, Server(server.url), None).parts_at == 0


def test_speed_is_told_against_the_server_without_speculation(
    fake: Making, results: Results, tmp_path: Path
) -> None:
    with serving(fake(tells="nothing")) as plain:
        _, said, _ = check(fake(), results, tmp_path, "--plain", plain.url)
    count = len(said.prompts)
    assert said.speedup and said.plain_tokens_per_s and said.plain_url == plain.url
    assert f"{count} of {count} texts are those of the server without speculation" in said.reasons
    assert len(plain.asked) == count


def test_prompts_are_greedy_token_ids_and_go_nowhere_else(
    fake: Making, results: Results, promises: list[Promise], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = fake()
    check(server, results, tmp_path, "--prompts", "1")
    first = server.asked[0]
    assert first["prompt"] == promises[0].prompt.tokens
    assert (first["temperature"], first["repetition_penalty"], first["presence_penalty"]) == (0, 1, 0)
    assert len(server.asked) == len({promise.prompt.dataset + promise.prompt.context for promise in promises})


def test_a_server_that_is_not_there_and_one_of_several_models(fake: Making) -> None:
    with pytest.raises(Incomplete, match="does not answer"):
        Server("http://127.0.0.1:9/v1")
    with serving(fake(models=("a", "b"))) as server:
        with pytest.raises(BadData, match="serves a, b: name one with --served-as"):
            Server(server.url)
        assert Server(f"{server.url}/v1/", "b").model == "b"


@pytest.mark.parametrize("drafted", [GAMMA - 1, GAMMA + 1])
def test_another_number_of_drafts_a_round_is_no_pass(
    fake: Making, results: Results, tmp_path: Path, drafted: int
) -> None:
    code, said, _ = check(fake(drafted=drafted), results, tmp_path)
    assert code == 6
    assert (
        said.reasons[0]
        == f"the server drafts {drafted:.2f} tokens a round, and {GAMMA} were promised: see --gamma"
    )


def test_a_server_that_drafts_nothing_is_no_pass(
    fake: Making, results: Results, promises: list[Promise], tmp_path: Path
) -> None:
    silent = fake()
    silent.drafts = lambda prompt: (0, 0, [0] * GAMMA)
    code, said, _ = check(silent, results, tmp_path)
    assert code == 6 and said.served is None and not said.by_position
    count = len(promises)
    assert f"{count} of {count} prompts tell nothing of drafts: the server drafted nothing" in said.reasons


def test_a_failing_server_without_speculation_costs_the_speedup_alone(
    fake: Making, results: Results, tmp_path: Path
) -> None:
    with serving(fake(fault="refuse")) as plain:
        code, said, _ = check(fake(), results, tmp_path, "--plain", plain.url)
    assert (code, said.speedup) == (0, None) and said.tokens_per_s
    assert any("without speculation: " in reason and "answers 400" in reason for reason in said.reasons)


def test_a_version_of_another_training_is_refused(results: Results) -> None:
    made = {"drafter": "multi_view", "drafter_artifact": results.drafter.fingerprint}
    must_be_of(Version("", "m", 1, "r", made), results)
    with pytest.raises(BadData, match="m version 1 is multi_view of another training than multi_view of"):
        must_be_of(Version("", "m", 1, "r", {**made, "drafter_artifact": "other"}), results)


def test_a_registered_drafter_is_the_one_that_is_checked(
    fake: Making, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a run registered another drafter than its last."""
    other = open_results(results.report.path, "full_only").drafter.fingerprint
    asked: list[tuple[str | None, str]] = []

    def resolve(uri: str, model: str | None, reference: str) -> Version:
        asked.append((model, reference))
        return Version(uri, "m", 7, "r", {"drafter": "full_only", "drafter_artifact": other})

    monkeypatch.setattr(versions, "resolve", resolve)
    monkeypatch.setattr(served, "attach", lambda version, check, folder: f"{folder.name} of {version.number}")
    _, said, output = check(fake(), results, tmp_path / "it", "--registered", "job_1", "--model", "m")
    assert said.drafter == "full_only" and asked == [("m", "job_1")] and "it of 7" in output


def test_cells_that_were_not_replayed_are_refused_with_those_that_were(results: Results) -> None:
    why = r"no replay of multi_view behind window/64 at γ = 2; there are .*full at γ = 2"
    with pytest.raises(BadData, match=why):
        promises_of(results, served_view(64, 0), GAMMA, 4)
    assert served_view(None, 0) == FULL and served_view(64, 4) == View("window", 64, sinks=4)


def test_the_histogram_becomes_acceptances_by_position() -> None:
    told = client.drafted_of(json.loads('{"acceptance_histogram": [5, 3, 0, 2], "num_draft_tokens": 30}'))
    assert told == client.Drafted(10, 30, (5, 2, 2))
