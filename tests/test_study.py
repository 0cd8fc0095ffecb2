"""The study of conf/paper-small: what its page says of rows, and all of it at a toy size."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import study, study_ablations, study_tables
from benchmarks.study_ablations import BySeed, Change
from pipeline.report.summary import FamilyGain, Summary
from pipeline.rows import PromptRow
from tests.test_books import made_books

ROOT = Path(__file__).resolve().parent.parent
TOY = (
    "data.tokenizer.vocab_size=400",
    "data.sequence_tokens=288",
    "data.contexts=[{name: 1K, tokens: 96}, {name: 2K, tokens: 128}, {name: 4K, tokens: 192}]",
    "data.max_new_tokens=16",
    "data.prompts=4",
    "data.validation_prompts=2",
    "target={kind: scratch, layers: 2, hidden: 32, heads: 2, kv_heads: 2, intermediate: 64, "
    "max_positions: 288, pretrain: {steps: 40, batch_sequences: 4, learning_rate: 0.02}}",
    "drafter={kind: scratch, layers: 1, hidden: 32, heads: 2, kv_heads: 2, intermediate: 64, "
    "max_positions: 288, pretrain: {steps: 10, batch_sequences: 4, sequence_tokens: 96}}",
    "labels.max_sequences=16",
    "labels.top_k=8",
    "train.steps=3",
    "train.warmup_steps=1",
    "train.window_tokens=16",
    "train.min_prefix_tokens=64",
    "train.checkpoint_every=3",
    "train.validate_every=3",
    "sweep.budgets=[0, 64, full]",
    "sweep.gammas=[2, 4]",
    "sweep.measure.prompts=1",
    "sweep.measure.repeats=1",
    "decode.compile=none",
    "report.bootstrap_samples=100",
    "report.least_documents=2",
    "tracking.enabled=false",
    "run.executor=inline",
)


def make_row(prompt: str, accepted: int, proposed: int, document: str = "d") -> PromptRow:
    return PromptRow(
        drafter="a", dataset="x", context="1K", policy="chunk_topk", budget=64, control=None, gamma=4,
        temperature=0.0, seed=0, mode="replay", prompt_id=prompt, document_id=document, num_tokens=63,
        num_rounds=20, num_proposed=proposed, num_accepted=accepted, reached=[], kept=[], repetition_rate=0.0,
        looping=False, in_trained_range=True, drafter_kv_bytes=1,
    )  # fmt: skip


def test_a_difference_is_of_what_both_families_hold() -> None:
    """Seeds that one of them lacks, and prompts that any drafter lacks, count on neither side."""
    ours: BySeed = {
        "1": {"p": make_row("p", 30, 100, "d"), "q": make_row("q", 10, 50, "e"), "r": make_row("r", 50, 50)},
        "2": {"p": make_row("p", 50, 100, "d"), "q": make_row("q", 20, 50, "e")},
        "3": {"p": make_row("p", 100, 100), "q": make_row("q", 50, 50)},
    }
    theirs: BySeed = {
        "1": {"p": make_row("p", 20, 80, "d"), "q": make_row("q", 10, 20, "e")},
        "2": {"p": make_row("p", 10, 80, "d"), "q": make_row("q", 10, 20, "e")},
    }
    found = study_ablations.difference(ours, theirs)
    by_seed = [40 / 150 - 30 / 100, 70 / 150 - 20 / 100]
    assert found.mean == pytest.approx(np.mean(by_seed))
    # Every resample takes two of two documents and two of two seeds: all there can be, by hand.
    pooled = {
        ("1", "p"): 30 / 100 - 20 / 80, ("1", "q"): 10 / 50 - 10 / 20, ("1", "both"): by_seed[0],
        ("2", "p"): 50 / 100 - 10 / 80, ("2", "q"): 20 / 50 - 10 / 20, ("2", "both"): by_seed[1],
    }  # fmt: skip
    possible = [
        np.mean([pooled[first, documents], pooled[second, documents]])
        for documents in ("p", "q", "both")
        for first, second in itertools.product("12", repeat=2)
    ]
    assert (found.low, found.high) == pytest.approx((min(possible), max(possible)))
    assert found.by_seed == pytest.approx(by_seed)
    with pytest.raises(ValueError, match="no training seed or no prompt in common"):
        study_ablations.difference({"1": {"p": make_row("p", 1, 2)}}, {"1": {"q": make_row("q", 1, 2)}})


def test_a_difference_without_looping_texts_leaves_them_out() -> None:
    looping = make_row("p", 90, 100).model_copy(update={"looping": True})
    where = "x", 64, 0.0, None
    ours = {"1": {"p": looping, "q": make_row("q", 30, 100)}}
    theirs = {"1": {"p": looping, "q": make_row("q", 20, 100)}}
    column = study_ablations.Column(64, 0.0, without_looping=True)
    cells: study_ablations.Families = {("kl", *where): ours, ("multi_view", *where): theirs}
    found = study_ablations.change(cells, "kl", "x", column)
    assert found and found.mean == pytest.approx(0.1)
    cells = {key: {"1": {"p": looping}} for key in cells}
    assert study_ablations.change(cells, "kl", "x", column) is None


def test_a_change_is_clear_by_its_interval_and_by_students_t() -> None:
    """t over 1, 2 and 3 points: 2 ± 4.303 · 1 ÷ √3 = 2 ± 2.48, not clear; over 2, 2.5, 3, ± 1.24, clear."""
    wide = Change(0.02, 0.01, 0.03, [0.01, 0.02, 0.03])
    assert wide.sign == 0
    narrow = Change(0.025, 0.02, 0.03, [0.02, 0.025, 0.03])
    assert narrow.sign == 1
    assert Change(-0.025, -0.03, -0.02, [-0.02, -0.025, -0.03]).sign == -1
    assert narrow._replace(low=-0.001).sign == 0, "the documents differ too much"
    single = Change(0.02, 0.01, 0.03, [0.02])
    assert (single.sign, single.spread) == (1, 0) and wide.spread == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("signs", "verdict"),
    [
        ((1, 1, 0), "helps"),
        ((1, 0, 0), "is clear only in data-0 (up)"),
        ((1, 1, -1), "is clear only in data-0 (up), data-1 (up), data-2 (down)"),
        ((-1, -1, 0), "hurts"),
        ((0, 0, 0), "makes no clear difference"),
    ],
)
def test_a_change_helps_where_two_data_sets_say_so_and_none_the_contrary(
    signs: tuple[int, ...], verdict: str
) -> None:
    nothing = Change(0.0, -0.01, 0.01, [-0.001, 0.0, 0.001])

    def told(sign: int) -> Change:
        by_seed = [0.018 * sign, 0.02 * sign, 0.022 * sign]
        return Change(0.02 * sign, *sorted((0.01 * sign, 0.03 * sign)), by_seed) if sign else nothing

    rows: list[study_ablations.Ablation] = [
        ("kl", f"data-{k}", {"B = 64, greedy": told(sign), "B = 64, T = 1": nothing})
        for k, sign in enumerate(signs)
    ]
    (line,) = study_ablations.ablation_words(rows).splitlines()
    greedily, sampling = line.partition(": ")[2].split("; ")
    assert greedily.startswith(f"{verdict} greedily (")
    assert sampling.startswith(
        "makes no clear difference at temperature 1 (+0.0 to +0.0 points, seeds up to 0.2"
    )


def test_stopping_early_is_compared_over_the_same_prompts() -> None:
    """The fastest of each kind, as the ratio of all their seconds, by hand."""

    def timed(prompt: str, gamma: int, threshold: float, seconds: float) -> PromptRow:
        changes = {"gamma": gamma, "threshold": threshold, "decode_s": [seconds, seconds]}
        return make_row(prompt, 1, 2, prompt).model_copy(update=changes)

    rows = [
        timed(p, gamma, threshold, seconds)
        for gamma, threshold, both in ((1, 0.0, (3, 3)), (2, 0.0, (2, 3)), (4, 0.4, (1, 3)), (8, 0.4, (4, 3)))
        for p, seconds in zip("pq", both, strict=True)
    ]
    (found,) = study_tables.early_stops(rows).values()
    assert (found.fixed, found.early) == (2, 4)
    assert found.ratio.mean == pytest.approx(5 / 4)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1, 2)), "either prompt drawn twice"
    words = study_tables.adaptive_words({("x", "1K"): found})
    assert "in 1 of 1 places, clearly in 0, and clearly slower in 0" in words


def gain(mean: float, low: float, control: str | None = None) -> FamilyGain:
    return FamilyGain(
        drafter="multi_view", baseline="full_only", dataset="x", context="1K", policy="chunk_topk", budget=64,
        control=control, gamma=4, temperature=0.0, seed=0, mean=mean, low=low, high=mean + 0.01,
        num_prompts=9, num_documents=9, prompts="all", num_seeds=3, by_seed=[mean] * 3,
    )  # fmt: skip


def test_a_row_of_the_headline_is_met_by_its_lower_bound_and_says_what_the_control_explains() -> None:
    clear = [gain(0.08, 0.06), gain(0.06, 0.04, "other_prompt")]
    (row,) = study.headline_checks(clear, study_tables.PAPER)
    assert (row["value"], row["met"]) == (0.06, True)
    assert row["note"] == "+8.0 [+6.0, +9.0] points, 75 % of it under other_prompt"
    unclear = [gain(0.01, -0.01), gain(0.01, -0.01, "other_prompt")]
    (row,) = study.headline_checks(unclear, study_tables.PAPER)
    assert row["met"] is False and "other_prompt" not in str(row["note"]), "no gain, so no share of one"


@pytest.mark.long
@pytest.mark.timeout(1800)  # three processes for each of seven configs, twice
def test_the_whole_study_at_a_toy_size(tmp_path: Path) -> None:
    """Every config runs, every row of what was to be reached is there, and a second call only writes."""
    made_books(tmp_path / "data")
    grid = [{"row": "grid", "value": 2.0, "target": 3, "at_most": True, "met": True, "note": ""}]
    (tmp_path / "grid.json").write_text(json.dumps(grid))

    def written(folder: str) -> dict[str, bytes]:
        command = [
            sys.executable, "-m", "benchmarks.study", "--storage", str(tmp_path / "runs"),
            "--output", str(tmp_path / folder), "--grid", str(tmp_path / "grid.json"),
            f"data.root={tmp_path / 'data'}", *TOY,
        ]  # fmt: skip
        environment = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}

    files = written("first")
    assert set(files) == {"README.md", "summary.json", "table-1.png", "table-2.png", "figure-3.png"}
    summary = Summary.model_validate_json(files["summary.json"])
    rows = " ".join(check.row for check in summary.checks)
    wanted = ("replay = decoding", "prediction error", "recommended ÷ best", "plan: labels", "plan, peak")
    assert all(row in rows for row in (*wanted, "multi_view − full_only", "kl − full_only_kl", "grid"))
    (replayed,) = (check for check in summary.checks if check.row.startswith("replay = decoding"))
    assert replayed.met and replayed.value == 1
    planned = [check for check in summary.checks if check.row.startswith("plan")]
    assert len(planned) == 10
    # Texts this small end at once, so that there are fewer rows, and memory is what libraries take.
    assert all(check.value and 0.5 < check.value < 2 for check in planned), planned
    page = files["README.md"].decode()
    assert all(f"| `{name}` |" in page for name in study_ablations.CHANGES)
    again = written("second")
    first, second = (json.loads(one["summary.json"]) for one in (files, again))
    # What was found is the same; the seconds of looking it up, and what a process takes for a plan, are not.
    assert {**first, "stages": 0, "checks": 0} == {**second, "stages": 0, "checks": 0}
    assert [check["row"] for check in first["checks"]] == [check["row"] for check in second["checks"]]
    assert all(stage["cached"] for stage in second["stages"] if stage["name"] != "report")
