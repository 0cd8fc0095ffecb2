"""Where it is said what to deploy: report, command and MLflow, and what the command lacks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.recommend import advise
from jobs.stages.report import ReportInputs, report
from jobs.tracking.store import Run, Store
from jobs.tracking.tracker import Tracker
from pipeline.errors import BadData
from pipeline.results.summary import Summary
from pipeline.serving.flags import Engine
from pipeline.store.files import read_rows, write_rows
from pipeline.store.rows import CellRow, PromptRow
from tests.helpers.configs import MINIMAL
from tests.helpers.report import artifacts, config, measured, row
from tests.helpers.rows import varied

DEPLOY = "full_only, chunk_topk, B = 16, γ = 4, stopping under 0.4"
WHY = "the fastest of 2 measured cells, leaving out 1 not shown to be faster than autoregressive decoding"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two measured cells: the faster one fails its repeats, the other stops early."""
    rows = [row(prompt=n, accepted=6, budget="full") for n in range(12)]
    rows += [measured(prompt=n, budget="full", decode_s=[1.5, 1.5]) for n in range(12)]
    rows += [measured(prompt=n, accepted=7, threshold=0.4) for n in range(12)]
    again = [measured(prompt=n, budget="full", decode_s=[4.0, 4.0]) for n in range(12)]
    again += [measured(prompt=n, threshold=0.4, decode_s=[2.4, 2.4]) for n in range(12)]
    storage = tmp_path_factory.mktemp("report")
    prepare, teach, sweep = artifacts(storage, rows, [])
    write_rows(sweep.path / "rechecked" / "all.jsonl", again)
    return report(config(storage), ReportInputs(prepare, teach, sweep, stages=[])).path


def summary_of(folder: Path) -> Summary:
    return Summary.model_validate_json((folder / "summary.json").read_text())


def test_every_place_says_when_to_stop_and_why(made: Path) -> None:
    found = summary_of(made).findings
    assert f"code, 64: deploy {DEPLOY}: 1.25× [1.25, 1.25] on fresh repeats, {WHY}." in found
    page = " ".join(re.sub(r"<[^>]+>", " ", (made / "report.html").read_text()).split())
    assert f"{DEPLOY} {WHY} 1.50× [1.50, 1.50] 1.25× [1.25, 1.25] 1.25×" in page
    assert "full_only, chunk_topk, B = full, γ = 4: 0.75×" in page
    text = list(advise(made, 64, None, None, 1, 0.65))
    assert text[1] == (
        f"  deploy  {DEPLOY}: 1.25× [1.25, 1.25] on fresh repeats, end to end 1.03×; 6 documents timed, "
        "acceptance 70.0 % measured"
    )
    assert "lack the size of target and full_only" in text[2]
    assert text[3] == "          the fastest of 1 measured cells that the needs allow"
    assert "This is for greedy decoding." in text and any("(activations, logits)" in line for line in text)
    assert any("acceptance 60.0 % by replay" in line for line in advise(made, 64, None, None, 1, None))


def test_the_report_and_the_command_follow_the_run_off(tmp_path: Path) -> None:
    """The first measurement has the other order, and so have the fresh repeats."""

    def runs(full: float, sparse: float) -> list[PromptRow]:
        times = {"full": full, 16: sparse}
        return [measured(prompt=n, budget=b, decode_s=[s, s]) for n in range(12) for b, s in times.items()]

    rows = [row(prompt=n, budget=b) for n in range(12) for b in ("full", 16)] + runs(1.5, 2.0)
    prepare, teach, sweep = artifacts(tmp_path, rows, [])
    write_rows(sweep.path / "run_off" / "all.jsonl", runs(2.0, 1.2))
    write_rows(sweep.path / "rechecked" / "all.jsonl", runs(1.8, 2.0))
    folder = report(config(tmp_path), ReportInputs(prepare, teach, sweep, stages=[])).path
    (advice,) = summary_of(folder).recommendations
    assert advice.choice is not None and advice.choice.cell.budget == 16
    assert (advice.choice.run_off, advice.choice.again.mean) == pytest.approx((2.5, 1.5))
    assert advice.best_again == pytest.approx(3.0 / 1.8)
    text = list(advise(folder, 64, None, None, 1, None))
    assert text[1].startswith("  deploy  full_only, chunk_topk, B = 16, γ = 4: 1.50×")
    assert "by a run-off between 2" in text[3] and text[3].strip() == advice.why
    page = " ".join(re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text()).split())
    assert f"{advice.why} 1.50× [1.50, 1.50] 2.50× 1.50× [1.50, 1.50] 1.67×" in page


def test_batches_and_differing_texts_are_said(tmp_path: Path) -> None:
    """Twelve prompts, two decoded together, one of which differs from AR; "tales" was replayed alone."""
    rows = [
        measured(prompt=n, exact=n > 0, prompts_together=2, together_with=f"p{n - n % 2}") for n in range(12)
    ]
    rows += [row(prompt=n, dataset="tales") for n in range(12)]
    prepare, teach, sweep = artifacts(tmp_path, rows, [])
    sources = [{"kind": "text", "name": name, "files": ["stdlib"]} for name in ("code", "tales")]
    given = config(tmp_path, data={**MINIMAL["data"], "sources": sources})
    folder = report(given, ReportInputs(prepare, teach, sweep, stages=[])).path
    text = "\n".join(advise(folder, 64, None, None, 1, None))
    assert "6 documents timed, acceptance 50.0 % measured; 1 prompt(s) are not what AR gives" in text
    assert "Speeds were taken of up to 2 prompts decoded together." in text
    assert "tales, 64:\n  do not speculate here: no cell was measured" in text
    assert "decoded alone" not in "\n".join(advise(folder, 64, None, None, 4, None))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two contexts: at the first a window, the full cache and chunks pay, at the second nothing does."""
    cells: list[tuple[dict[str, Any], float]] = [
        ({"policy": "chunk_topk", "budget": 16}, 1.0),
        ({"policy": "window", "budget": 32, "sinks": 0}, 1.5),
        ({"policy": "window", "budget": 32, "sinks": 4, "gamma": 2}, 1.2),
        ({"policy": "chunk_topk", "budget": "full", "gamma": 2}, 2.0),
    ]
    rows = [
        varied(measured(prompt=n, decode_s=[s, s]), kind="head", **cell)
        for cell, s in cells
        for n in range(12)
    ]
    longer = [({"policy": "window", "budget": 32, "sinks": 0}, 4.0), ({"budget": 16}, 1.0)]
    rows += [
        varied(measured(prompt=n, decode_s=[s, s]), kind="head", context="128", **cell)
        for cell, s in longer
        for n in range(12)
    ]
    storage = tmp_path_factory.mktemp("served")
    contexts = [{"name": "64", "tokens": 64}, {"name": "128", "tokens": 128}]
    prepare, teach, sweep = artifacts(storage, rows, [])
    given = config(storage, data={**MINIMAL["data"], "contexts": contexts})
    return report(given, ReportInputs(prepare, teach, sweep, stages=[])).path


@pytest.mark.parametrize(
    ("engine", "deploy", "flags", "out"),
    [
        (
            "vllm",
            "window, B = 32, γ = 4: 2.00×",
            '--speculative-config \'{"method": "eagle3", "model": "EXPORTED", "num_speculative_tokens": 4}\'',
            "vLLM has windows without sinks",
        ),
        (
            "sglang",
            "window, B = 32, 4 of them sinks, γ = 2: 2.50×",
            "--speculative-algorithm EAGLE3 --speculative-draft-model-path EXPORTED "
            "--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3 "
            "--speculative-draft-window-size 32 --speculative-draft-sink-size 4",
            "SGLang has windows and the full cache, and no chunk_topk",
        ),
    ],
)
def test_an_engine_gets_flags_for_the_best_cell_that_it_can_serve(
    served: Path, engine: Engine, deploy: str, flags: str, out: str
) -> None:
    text = list(advise(served, 64, None, None, 1, None, engine))
    assert text[1].startswith(f"  deploy  full_only, {deploy}")
    assert f"  flags   {flags}" in text
    assert f"  out     1 measured cells: {out}" in text
    sinks = 0 if engine == "vllm" else 4
    wanted = f"budgetdraft export DRAFTER EXPORTED --for {engine} --window 32 --sinks {sinks} --target TARGET"
    assert any(line.endswith(wanted) for line in text)
    by = "64: γ = 4; 128: off" if engine == "vllm" else "64: γ = 2; 128: not known"
    assert f"  by      context, measured: {by}" in text, "of the drafter and view that the flags are of"
    assert any("measured at 1 alone, so no schedule" in line for line in text)
    assert next(iter(advise(served, 64, None, None, 1, None)))  # without an engine
    assert "chunk_topk, B = 16" in list(advise(served, 64, None, None, 1, None))[1]


def test_a_place_whose_cells_an_engine_cannot_serve_says_so(made: Path) -> None:
    text = list(advise(made, 64, None, None, 1, None, "vllm"))
    assert "  nothing that was measured can be served by vLLM" not in text, "the full cache can"
    assert "  out     1 measured cells: vLLM drafts γ tokens in every round" in text


def test_no_engine_has_a_target_behind_a_budget(tmp_path: Path) -> None:
    cells = {name: {"drafter": name, "policy": "snapkv"} for name in ("self_speculation", "cascade")}
    rows = [varied(measured(prompt=n), kind=name, **cell) for name, cell in cells.items() for n in range(12)]
    cascade = {"drafter": "multi_view", "budget": 16, "gamma": 2}
    given = config(tmp_path, sweep={**MINIMAL["sweep"], "baselines": [*cells], "cascade": cascade})
    folder = report(given, ReportInputs(*artifacts(tmp_path, rows, []), stages=[])).path
    text = list(advise(folder, 64, None, None, 1, None, "vllm"))
    assert {line for line in text if line.startswith("  out")} == {
        "  out     1 measured cells: vLLM has no target that drafts for itself behind a budget",
        "  out     1 measured cells: vLLM has no drafter that drafts for a middle model",
    }


def test_where_nothing_can_be_served(tmp_path: Path) -> None:
    rows = [measured(prompt=n) for n in range(12)]
    folder = report(config(tmp_path), ReportInputs(*artifacts(tmp_path, rows, []), stages=[])).path
    text = list(advise(folder, 64, None, None, 1, None, "sglang"))
    assert text[1] == "  nothing that was measured can be served by SGLang"
    assert text[2] == "  out     1 measured cells: SGLang has windows and the full cache, and no chunk_topk"


def test_the_tag_in_mlflow_says_it_too(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(Store, "log", lambda store, **told: logged.append(told))
    run = Run("report", {})
    tracker = Tracker(config(tmp_path), Store.__new__(Store), run)
    tracker.log_advice(run, summary_of(made).recommendations)
    assert tracker.writer.finish(5.0) == 0
    (told,) = logged
    assert told["run"] is run and told["tags"] == {"recommend.code.64": f"{DEPLOY}: {WHY}"}
    assert [value for _, value, _ in told["points"]] == pytest.approx([1.25] * 3)


# ── what is missing ───────────────────────────────────────────────────────────────────────────────


def test_another_context_is_said_to_stand_for_what_was_asked(made: Path) -> None:
    assert next(advise(made, 1, None, None, 1, None)) == "64 (64 tokens) stands for a context of 1 tokens."
    assert next(advise(made, 64, None, None, 1, None)) == "code, 64:"


@pytest.mark.parametrize(
    ("temperature", "dataset", "said"),
    [
        (None, None, "no measured speed at 64: set sweep.mode to both or measure, and run it again"),
        (0.7, None, "that is greedy, only at temperature 0.7: add 0.0 to sweep.temperatures"),
        (0.7, "poems", "no measured speed at 64 for data set 'poems'; there is code"),
    ],
)
def test_speeds_that_are_missing(
    made: Path, tmp_path: Path, temperature: float | None, dataset: str | None, said: str
) -> None:
    cells = read_rows(made / "cells.jsonl", CellRow)
    kept = [cell for cell in cells if cell.mode == "replay" or temperature]
    changed = [varied(cell, temperature=temperature or 0.0) for cell in kept]
    write_rows(tmp_path / "cells.jsonl", changed)
    for name in ("run_off.jsonl", "again.jsonl"):
        write_rows(tmp_path / name, [])
    (tmp_path / "summary.json").write_bytes((made / "summary.json").read_bytes())
    with pytest.raises(BadData, match=re.escape(said)):
        list(advise(tmp_path, 64, dataset, None, 1, None))


def test_a_summary_that_is_cut_off_is_not_one_of_another_version(made: Path, tmp_path: Path) -> None:
    for name in ("cells.jsonl", "run_off.jsonl", "again.jsonl"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    whole = (made / "summary.json").read_bytes()
    other = {"from": "elsewhere", **json.loads(whole)}
    for content, said in (
        (whole[: len(whole) // 2], r"summary\.json is not whole \(Invalid JSON.*run the stage report again"),
        (json.dumps(other).encode(), r"was not written by this version \(1 fields differ\)"),
    ):
        (tmp_path / "summary.json").write_bytes(content)
        with pytest.raises(BadData, match=said):
            list(advise(tmp_path, 64, None, None, 1, None))
