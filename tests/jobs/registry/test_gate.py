"""The gate on two evidences: verdicts where the truth is known, speed, files and exit codes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.registry import gate as gate_job
from jobs.registry.decision import Decision
from pipeline.config.files import load_group
from pipeline.config.gate import GateConfig
from pipeline.errors import BadData, ConfigError
from pipeline.gate.evidence import Evidence
from pipeline.gate.verdict import compare
from pipeline.intervals import paired_difference
from tests.helpers.paths import ROOT
from tests.helpers.report import measured, row
from tests.helpers.rows import varied

SEEDED = {"samples": 4000, "seed": 0, "error_rate": 0.025}
QUICK = GateConfig.model_validate({"bootstrap_samples": 400})


def evidence(rows: Any, **changes: Any) -> Evidence:
    values = {"drafter": "multi_view", "target": "t0", "prompts": "p0", "hardware": "", "config": "toy",
              "budgets": [16, "full"]}  # fmt: skip
    return Evidence(**{**values, **changes}, rows=rows)


def side(accepted: float, rng: np.random.Generator, prompts: int = 60, **changes: Any) -> list[Any]:
    """So many prompts of a document each, about `accepted` of 100 proposals; budgets 16 and full."""
    return [
        row(
            prompt=number, accepted=int(rng.normal(accepted, 5)), proposed=100,
            document_id=f"d{number}", budget=budget, **changes,
        )
        for budget in (16, "full")
        for number in range(prompts)
    ]  # fmt: skip


# ── two evidences ─────────────────────────────────────────────────────────────────────────────────


def test_a_cell_shows_what_its_rows_pool_to() -> None:
    rng = np.random.default_rng(5)
    candidate, baseline = side(55, rng), side(50, rng)
    candidate[:2] = [varied(one, looping=True, num_accepted=99) for one in candidate[:2]]
    controls = [side(accepted, rng, control="other_prompt") for accepted in (41, 40)]
    told = compare(evidence(candidate + controls[0]), evidence(baseline + controls[1]), QUICK)
    cell = told.cells[0]

    def counts(rows: list[Any], chosen: slice) -> Any:
        picked = rows[chosen]
        return [one.counts.num_accepted for one in picked], [one.counts.num_proposed for one in picked]

    def expected(first: list[Any], second: list[Any], chosen: slice = slice(60)) -> Any:
        clusters = [one.document_id for one in first[chosen]]
        return paired_difference(
            counts(first, chosen), counts(second, chosen), samples=400, seed=0, clusters=clusters
        )

    difference = expected(candidate, baseline)
    assert cell.name == "code, context 64, chunk_topk, B = 16, γ = 4"
    assert (cell.num_prompts, cell.num_documents, cell.num_looping) == (60, 60, 2)
    assert cell.candidate == sum(counts(candidate, slice(60))[0]) / 6000
    assert cell.difference == pytest.approx(difference.mean) and cell.floor == -0.01
    assert cell.low < difference.low < difference.high < cell.high  # 95 % is less sure than the gate is
    assert cell.not_looping == expected(candidate, baseline, slice(2, 60))
    assert cell.other_prompt == expected(*controls)


@pytest.mark.parametrize(
    ("accepted", "expected", "reason"),
    [
        (40, "fail", "acceptance in code, context 64, chunk_topk, B = 16, γ = 4: -10."),
        (55, "pass", "All 2 cells are above"),
        (49, "not_enough_evidence", "would be enough to decide with a chance of at least 80 %"),
    ],
)
def test_the_verdict_gives_its_reasons(accepted: float, expected: str, reason: str) -> None:
    rng = np.random.default_rng(6)
    told = compare(evidence(side(accepted, rng)), evidence(side(50, rng)), QUICK)
    assert told.verdict == expected and reason in " ".join(told.reasons)


def test_a_drafter_against_itself_passes_a_margin_and_decides_nothing_without_one() -> None:
    same = evidence(side(50, np.random.default_rng(7)))
    assert compare(same, same, QUICK).verdict == "pass"
    strict = QUICK.model_copy(update={"margins": QUICK.margins.model_copy(update={"acceptance": 0.0})})
    told = compare(same, same, strict)
    assert told.verdict == "not_enough_evidence" and "no number of prompts" in told.reasons[-1]


def test_too_few_documents_decide_nothing_however_large_the_loss() -> None:
    rng = np.random.default_rng(8)
    few = QUICK.least_documents - 1
    told = compare(evidence(side(10, rng, few)), evidence(side(80, rng, few)), QUICK)
    assert told.verdict == "not_enough_evidence" and told.cells[0].low is None
    assert told.cells[0].documents_needed == QUICK.least_documents
    # Where the loss is small, reaching the least number would not decide either.
    near = compare(evidence(side(48, rng, few)), evidence(side(50, rng, few)), QUICK)
    assert all((cell.documents_needed or 10**9) > QUICK.least_documents for cell in near.cells)
    assert f"{few} of at least {QUICK.least_documents}" in " ".join(told.reasons)


def test_prompts_of_one_document_are_one_unit() -> None:
    rng = np.random.default_rng(9)
    pairs = [side(accepted, rng) for accepted in (50, 50)]
    halved = [[varied(one, document_id=f"d{number // 3}") for number, one in enumerate(rows)]
              for rows in pairs]  # fmt: skip
    told = compare(evidence(halved[0]), evidence(halved[1]), QUICK)
    assert {(cell.num_prompts, cell.num_documents) for cell in told.cells} == {(60, 20)}


def test_sampled_texts_are_compared_where_the_config_asks_for_their_temperature() -> None:
    rng = np.random.default_rng(10)
    changes: dict[str, Any] = {"mode": "estimate", "temperature": 1.0, "seed": 3}
    pair = [evidence(side(50, rng) + side(accepted, rng, **changes)) for accepted in (60, 40)]
    sampled = QUICK.model_copy(update={"temperatures": (1.0,)})
    told = compare(*pair, sampled)
    assert told.verdict == "pass" and {row.cell.temperature for row in told.cells} == {1.0}
    assert {row.cell.temperature for row in compare(*pair, QUICK).cells} == {0.0}


@pytest.mark.parametrize(
    ("changes", "drop", "match"),
    [
        ({"target": "t1"}, None, "another target or tokenizer.* t0 and t1"),
        ({"prompts": "p1"}, None, "other prompts"),
        ({}, slice(60, None), "baseline was not evaluated in .*B = full.*1 cells differ"),
        ({}, slice(60, 61), "only one side has prompt 'p0' in .*B = full"),
        ({}, slice(0, 120), "nothing was evaluated at gamma 4"),
    ],
)
def test_what_was_not_evaluated_alike_is_refused(
    changes: dict[str, str], drop: slice | None, match: str
) -> None:
    rows = side(50, np.random.default_rng(11))
    other = list(rows)
    if drop is not None:
        del other[drop]
    own = rows if other else [varied(one, gamma=2) for one in rows]
    with pytest.raises(BadData, match=match):
        compare(evidence(own), evidence(other, **changes), QUICK)


# ── speed ─────────────────────────────────────────────────────────────────────────────────────────

SPEED = load_group(GateConfig, ROOT / "conf/gate.yaml", ["margins.speed=0.05", "bootstrap_samples=400"])


def timed(seconds: float, rng: np.random.Generator, prompts: int = 30, **changes: Any) -> list[Any]:
    """Measured prompts that take about `seconds`, against 3 s of AR: a speedup of about 3 ÷ `seconds`."""
    return [
        measured(
            prompt=number, document_id=f"d{number}", num_accepted=50, num_proposed=100,
            decode_s=list(seconds * rng.normal(1, 0.03, 3)), ar_decode_s=[3.0, 3.0, 3.0], **changes,
        )
        for number in range(prompts)
    ]  # fmt: skip


def speeds(candidate_s: float, hardware: str = "cpu", **changes: Any) -> tuple[Evidence, Evidence]:
    rng = np.random.default_rng(12)
    return (
        evidence(side(60, rng) + timed(candidate_s, rng, **changes), hardware="cpu"),
        evidence(side(50, rng) + timed(2.0, rng, **changes), hardware=hardware),
    )


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1.9, "pass"), (2.5, "fail"), (2.0 / 0.95, "not_enough_evidence")]
)
def test_speed_is_held_against_its_own_margin(seconds: float, expected: str) -> None:
    told = compare(*speeds(seconds), SPEED)
    (cell,) = [cell for cell in told.cells if cell.metric == "speed"]
    assert told.verdict == expected
    assert cell.baseline == pytest.approx(1.5, rel=0.02) and cell.candidate == pytest.approx(
        3 / seconds, rel=0.02
    )
    assert cell.difference == pytest.approx(2 / seconds - 1, abs=0.02) and cell.floor == pytest.approx(-0.05)
    assert cell.low < cell.difference < cell.high and cell.num_documents == 30


@pytest.mark.parametrize(
    ("hardware", "reason"),
    [("gpu", "measured on cpu, the baseline's on gpu"), ("", "no speed of the baseline")],
)
def test_speed_that_cannot_be_compared_never_passes(hardware: str, reason: str) -> None:
    pair = speeds(1.5, hardware)
    told = compare(*pair, SPEED)
    assert told.verdict == "not_enough_evidence" and reason in told.reasons[0]
    assert compare(*pair, QUICK).verdict == "pass"  # where nobody asks for speed


def test_documents_of_one_batch_are_one_unit_of_its_clock() -> None:
    candidate, baseline = speeds(1.9)

    def together(one: Any) -> Any:
        if one.mode != "measure":
            return one
        first = int(one.prompt_id[1:]) // 5 * 5
        return varied(one, prompts_together=5, together_with=f"p{first}")

    batched = [
        evidence([together(one) for one in each.rows], hardware="cpu") for each in (candidate, baseline)
    ]
    told = compare(*batched, SPEED)
    counts = {(cell.metric, cell.num_prompts, cell.num_documents) for cell in told.cells}
    # 30 measured documents in six batches, 30 others alone.
    assert counts == {("acceptance", 60, 36), ("speed", 30, 6)}


# ── the command ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report folders by name, without the pipeline that would make them."""
    rng = np.random.default_rng(13)
    known = {"worse": 40, "same": 50, "better": 57}
    made = {name: evidence(side(accepted, rng), drafter=name) for name, accepted in known.items()}
    made["near"] = evidence(side(49.5, rng), drafter="near")
    monkeypatch.setattr(gate_job, "read_evidence", lambda path, drafter: made[drafter or path.name[7:]])


@pytest.mark.parametrize(
    ("candidate", "verdict_", "code"),
    [
        ("report-better", "pass", 0),
        ("runs/report-x:worse", "fail", 5),
        ("report-near", "not_enough_evidence", 6),
    ],
)
def test_the_command_writes_three_files_and_exits_by_verdict(
    results: None, tmp_path: Path, candidate: str, verdict_: str, code: int
) -> None:
    arguments = ["gate", "--candidate", candidate, "--baseline", "report-same", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--config", str(ROOT / "conf/gate.yaml")])
    assert done.exit_code == code, done.output
    assert done.stdout.splitlines()[-1] == str(tmp_path / "gate.json")
    decision = Decision.model_validate_json((tmp_path / "gate.json").read_text())
    assert decision.verdict == verdict_ and decision.gate == GateConfig()
    assert decision.candidate.version is None and decision.model is None
    text = (tmp_path / "gate.md").read_text()
    assert text.startswith("## Gate: ") and all(reason in text for reason in decision.reasons)
    table = [line for line in text.splitlines() if line.startswith("| code")]
    assert len(table) == 2 and len({line.count("|") for line in table}) == 1
    assert all(line.count("●") == 1 for line in table)
    assert (tmp_path / "gate.png").read_bytes().startswith(b"\x89PNG")


def test_results_without_a_registry_are_not_promoted(results: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--promote"):
        gate_job.decide("report-better", "report-same", QUICK, tmp_path, "", promote=True)
    assert not list(tmp_path.iterdir())


def test_the_shipped_config_is_the_default_and_errors_name_the_field(tmp_path: Path) -> None:
    assert load_group(GateConfig, ROOT / "conf/gate.yaml") == GateConfig()
    wrong = tmp_path / "gate.yaml"
    wrong.write_text(json.dumps({"gamas": [4], "margins": {"acceptance": 2}, "error_rate": 0.9}))
    with pytest.raises(ConfigError) as error:
        load_group(GateConfig, wrong)
    for part in (
        "did you mean gammas?",
        "margins.acceptance = 2",
        "above -1 and below 1",
        "error_rate = 0.9",
    ):
        assert part in str(error.value)
