"""The study of a real target: what was to be reached, and its page from a finished toy run."""

from __future__ import annotations

import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page_parts import acceptance, check_table
from benchmarks.real_study import __main__ as real_study
from benchmarks.real_study import checks, tables
from benchmarks.study import runs
from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import dump_config
from pipeline.intervals import Interval
from pipeline.results.axes import Axes
from pipeline.results.summary import Check, Gain, Summary
from pipeline.store.files import read_rows
from pipeline.store.layout import CELLS
from pipeline.store.rows import CellRow
from tests.helpers.study_rows import EMPTY, gain, measured, replayed
from tests.helpers.toys import artifact, toy_config
from tests.jobs.stages.test_answers import asking


def summary(**parts: Any) -> Summary:
    return Summary.model_construct(**{"headline": [], "families": [], "controls": []} | parts)


def study(**parts: Any) -> runs.Study:
    return replace(EMPTY, **parts)


def test_a_place_whose_texts_loop_is_no_headline_and_few_documents_are_no_verdict() -> None:
    rows = [
        replayed("full_only", num_prompts=20, num_looping=6, num_documents=20),
        replayed("multi_view", num_prompts=20, num_looping=20, num_documents=20),
        replayed("full_only", dataset="y", num_prompts=10, num_looping=4, num_documents=9),
    ]
    rows += [replayed("full_only", dataset="z", num_prompts=20, num_looping=7, num_documents=20)]
    fine, few, looping = checks.looping(study(cells=rows))
    assert (fine.value, fine.met) == (0.3, True), "the drafter does not matter: texts are the target's"
    assert (few.value, few.met) == (0.4, None) and (looping.value, looping.met) == (0.35, False)
    assert "too few documents for a verdict: 9 of 20" in few.note and "too few" not in fine.note


def test_the_fastest_cell_is_judged_on_fresh_repeats_alone() -> None:
    slow, fast = measured("full_only", 1.2), measured("multi_view", 1.6)
    (once,) = checks.faster(study(cells=[slow, fast]))
    assert (once.value, once.met) == (1.6, None) and "no fresh repeats" in once.note
    assert fast.speed
    for low, met in ((1.39, False), (1.41, True)):
        speed = fast.speed.model_copy(update={"speedup": Interval(1.5, low, 1.6)})
        again = [fast.model_copy(update={"speed": speed})]
        (judged,) = checks.faster(study(cells=[slow, fast], again=again))
        assert (judged.value, judged.low, judged.met) == (1.5, low, met)


def test_gains_are_of_the_smallest_budget_and_say_what_needs_the_context() -> None:
    one = Gain.model_validate(gain(0.08, 0.06).model_dump(include=set(Gain.model_fields)))
    under = one.model_copy(
        update={"cell": one.cell.vary(control="other_prompt"), "lost": Interval(0.02, 0.01, 0.03)}
    )
    elsewhere = one.model_copy(update={"cell": one.cell.vary(budget="full")})
    run = study(summary=summary(headline=[one, under, elsewhere]))
    assert tables.smallest(run) == 64
    (row,) = checks.gained(run)
    assert (row.value, row.low, row.met) == (0.08, 0.06, None), "of nine documents"
    assert row.note.startswith("+8.0 [+6.0, +9.0] points, of which +2.0 [+1.0, +3.0] need the context")
    assert not list(checks.half_of_the_places(run))
    wide = [g.model_copy(update={"num_documents": 20}) for g in (one, under)]
    lower = wide[0].model_copy(update={"value": Interval(0.01, -0.01, 0.02)})
    others = [lower.model_copy(update={"cell": lower.cell.vary(dataset=name)}) for name in "yz"]
    (half,) = checks.half_of_the_places(study(summary=summary(headline=[*wide, *others])))
    assert (half.value, half.met, half.note[:6]) == (1 / 3, False, "1 of 3")
    words = tables.headline_words(run)
    assert words.startswith(
        "Greedy `multi_view` is accepted clearly more in 1 of 1 places and clearly less in 0, and in 1"
    )


def test_a_check_shows_its_interval_and_what_is_not_decided() -> None:
    table = check_table(
        [
            Check(row="a", value=1.234, low=1.0, high=1.5, target="t", met=None).model_dump(),
            Check(row="b", value=None, target="t", met=None).model_dump(),
            {"row": "c", "value": 2.0, "target": "t", "met": True, "note": ""},
        ]
    )
    assert "| a | 1.23 [1, 1.5] | t | not decided |  |" in table
    assert "| b |  | t |" in table and "| c | 2 | t | yes |" in table


def test_families_come_before_single_drafters() -> None:
    """With three seeds each the drafters of one seed are no headline."""
    run = study(summary=summary(families=[gain(0.08, 0.06)], headline=[gain(0.01, -0.01)]))
    (row,) = checks.gained(run)
    assert row.value == 0.08


def test_the_page_of_a_finished_run(
    finished: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, costs, output = tmp_path / "toy.yaml", tmp_path / "real.json", tmp_path / "page"
    given = toy_config(corpus, finished)
    config.write_text(dump_config(given))
    step = {"row": "a step", "value": 1.1, "low": 1.0, "high": 1.2, "met": True, "note": "n"}
    aims = {"target": 1.5, "at_most": True}
    costs.write_text(json.dumps([{**step, **aims}, {**step, **aims, "row": "no aim", "target": None}]))
    stages: list[str] = []
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: stages.append(command[3]))
    real_study.main([str(config), "--storage", str(finished), "--output", str(output), "--costs", str(costs)])
    assert stages == ["teach", "train", "sweep"]
    written = Summary.model_validate_json((output / "summary.json").read_text())
    rows = {check.row: check for check in written.checks}
    assert rows["a step"] == Check(target="at most 1.5", **step)  # type: ignore[arg-type]
    assert "no aim" not in rows
    assert rows["replay = decoding, prompt rows that were both replayed and measured"].met
    page = (output / "README.md").read_text()
    for heading in ("What was to be reached", "Speed, measured", "What to deploy"):
        assert f"## {heading}\n" in page
    cells = [c for c in read_rows(artifact(finished, "report") / CELLS, CellRow) if c.mode == "replay"]
    led = [c for c in cells if c.cell.gamma == Axes.of(given).gamma and not c.cell.control]
    assert led and all(acceptance(cell) in page for cell in led)
    for image in output.glob("*.png"):
        assert f"]({image.name})" in page


@pytest.mark.slow
def test_what_the_target_answered_lies_beside_the_page(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file, output = (
        toy_config(corpus, tmp_path / "runs", asking),
        tmp_path / "toy.yaml",
        tmp_path / "page",
    )
    file.write_text(dump_config(config))
    run_pipeline(config)
    monkeypatch.setattr(runs.subprocess, "run", lambda command, check: None)
    real_study.main([str(file), "--storage", str(tmp_path / "runs"), "--output", str(output)])
    (line,) = (x for x in (output / "README.md").read_text().splitlines() if x.startswith("- Labels and"))
    assert f"labels.answers.written={output}/answers.jsonl.xz` on the command" in line
    first, *prompts = lzma.decompress((output / "answers.jsonl.xz").read_bytes()).splitlines()
    assert json.loads(first)["target"] == "a toy" and len(prompts) == 10
