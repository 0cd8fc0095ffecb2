"""The paper's experiments at the scale of two cores: run every config, then write tables, figures and checks.

    python -m benchmarks.study --storage runs --output docs/results/paper-small

What is complete in the storage is reused, so that a second call only writes. Every figure comes from the
reports of the runs; nothing is typed in. Each stage runs in a process of its own, whose peak memory is then
the stage's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import study_tables as tables
from jobs.pipeline import run_pipeline, settled
from jobs.sweep import ROWS
from pipeline import planner
from pipeline.artifacts import read_all, read_rows, write_text
from pipeline.config import Config
from pipeline.config_files import dump_config, load_config
from pipeline.report.summary import FamilyGain, Summary
from pipeline.rows import CellRow, PredictedRow, PromptRow

CONFIGS = ("table-1", "table-2", "figure-3", "adaptive", "table-3", "ablations", "on-policy")
FOLDER = "conf/paper-small"
FIGURES = {
    "table-1": "acceptance_by_budget_chunk_topk",
    "table-2": "speedup_by_context",
    "figure-3": "speedup_by_gamma",
}


@dataclass(frozen=True)
class Study:
    """One finished run: its config, its report, and the rows of its sweep, those measured again apart."""

    config: Config
    report: Path
    summary: Summary
    cells: list[CellRow]
    predicted: list[PredictedRow]
    rows: list[PromptRow]
    rechecked: list[PromptRow]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results/paper-small"))
    parser.add_argument(
        "--grid", type=Path, help="bench.json with the rows of `python -m benchmarks --only grid`"
    )
    parser.add_argument("overrides", nargs="*", help="fields of every config, such as run.executor=inline")
    given = parser.parse_args()
    studies = {name: study(name, given.storage, given.overrides) for name in CONFIGS}
    checks = [
        *own_checks(studies["table-1"]),
        *headline_checks(studies["table-1"].summary.families, tables.PAPER),
        *headline_checks(studies["ablations"].summary.families, tables.KL),
        *plan_checks(studies, Path(given.storage)),
        *bench_checks(given.grid),
    ]
    given.output.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        shutil.copyfile(studies[name].report / "figures" / f"{figure}.png", given.output / f"{name}.png")
    write_text(given.output / "README.md", tables.page(studies, checks))
    summary = studies["table-1"].summary.model_dump(mode="json")
    kl = tables.headline(studies["ablations"].summary.families, tables.KL)
    summary["families"] += [gain.model_dump(mode="json") for gain in kl]
    # Of every γ it would be megabytes; all are in the run's own summary.
    for name in ("acceptance", "headline", "families", "controls"):
        summary[name] = [row for row in summary[name] if row["gamma"] == tables.GAMMA]
    text = json.dumps({**summary, "checks": checks}, separators=(",", ":"), ensure_ascii=False)
    write_text(given.output / "summary.json", text + "\n")
    print(given.output)


def study(name: str, storage: str, overrides: Sequence[str]) -> Study:
    file = Path(FOLDER) / f"{name}.yaml"
    given = [*overrides, f"storage={json.dumps(storage)}"]
    for stage in ("teach", "train", "sweep"):
        subprocess.run([sys.executable, "-m", "jobs", stage, str(file), *given], check=True)
    config = settled(load_config(file, given))
    report = run_pipeline(config).parent
    summary = Summary.model_validate_json((report / "summary.json").read_text(encoding="utf-8"))
    inputs = json.loads((report / "manifest.json").read_text())["inputs"]
    swept = Path(storage) / f"sweep-{inputs['sweep']}"
    return Study(
        config,
        report,
        summary,
        read_rows(report / "cells.jsonl", CellRow),
        read_rows(report / "predicted.jsonl", PredictedRow),
        read_all(swept / ROWS, PromptRow),
        [row for folder in planner.LATER for row in read_all(swept / folder, PromptRow)],
    )


# ── checks ────────────────────────────────────────────────────────────────────────────────────────


def check(row: str, value: float | None, target: str, met: bool | None, note: str = "") -> dict[str, object]:
    return {"row": row, "value": value, "target": target, "met": met, "note": note}


def own_checks(grid: Study) -> Iterator[dict[str, object]]:
    """What the run of the whole grid shows by itself."""
    summary = grid.summary
    replayed = summary.replay_check
    yield check(
        "replay = decoding, prompt rows that were both replayed and measured",
        replayed.equal / replayed.rows,
        "1",
        replayed.equal == replayed.rows,
        f"{replayed.equal} of {replayed.rows}; round by round on tiny models: tests/test_replay.py",
    )
    for score in summary.prediction:
        if score.what == "plane":
            yield check(
                f"prediction error of decode time, median, {score.dataset} {score.context}",
                score.median_error,
                "at most 0.10",
                score.median_error <= 0.10,
                f"{score.cells} cells, the worst {score.worst_error:.2f}",
            )
    for advice in summary.recommendations:
        ratio = None
        if advice.choice and advice.choice.again and advice.best_again and advice.num_again > 1:
            ratio = advice.choice.again / advice.best_again
        yield check(
            f"recommended ÷ best measured speed on fresh repeats, {advice.dataset} {advice.context}",
            ratio,
            "at least 0.95",
            None if ratio is None else ratio >= 0.95,
            f"of {advice.num_again} cells; {advice.why}" if advice.choice else advice.why,
        )


def headline_checks(families: Sequence[FamilyGain], pair: tuple[str, str]) -> Iterator[dict[str, object]]:
    """Whether the first family is accepted more than the second behind the smallest budget."""
    for gain in tables.headline(families, pair):
        share = tables.explained(families, gain)
        yield check(
            f"{gain.drafter} − {gain.baseline} at B = {gain.budget}, {gain.dataset} {gain.context}, "
            f"{tables.when(gain.temperature)}: lower bound",
            gain.low,
            "above 0",
            gain.low > 0,
            f"{tables.points(gain)} points" + (f", {share} of it under other_prompt" if share else ""),
        )


def plan_checks(studies: Mapping[str, Study], storage: Path) -> Iterator[dict[str, object]]:
    """What `budgetdraft plan` says before anything has run against what there was: amounts and memory."""
    plans = {name: planned(studies[name].config) for name in ("table-1", "table-2", "table-3")}

    def manifest(folder: Path) -> Any:
        return json.loads((folder / "manifest.json").read_text())

    grid = studies["table-1"]
    sequences = manifest(grid.report / grid.summary.prepared)["counts"]["sequences"]
    labels = manifest(artifact(grid, storage, "teach"))["counts"]["label_bytes"]
    swept = {name: manifest(artifact(studies[name], storage, "sweep")) for name in ("table-2", "table-3")}
    for name, what, found in (
        ("table-1", "training tokens", sequences * grid.config.data.sequence_tokens),
        ("table-1", "labels on disk", labels),
        ("table-3", "rows of replay", swept["table-3"]["counts"]["rows"]),
        ("table-2", "rows measured", swept["table-2"]["counts"]["rows"]),
        ("table-1", "rows measured", sum(row.mode == "measure" for row in grid.rows)),
        ("table-1", "rows measured again", len(grid.rechecked)),
    ):
        yield within(f"plan: {what}, {name}", plans[name][what], found)
    trained = {peak.model: max(peak.ranks) for peak in grid.summary.training_memory}
    drafters = [
        trained[f"drafter-{drafter.name}"] for drafter in grid.config.train.drafters if drafter.steps != 0
    ]
    for name, stage, found in (
        ("table-1", "pretrain target", trained["pretrain-target"]),
        ("table-1", "train", max(drafters)),
        ("table-3", "sweep replay", swept["table-3"]["peak_memory_bytes"]),
        ("table-2", "sweep measure", swept["table-2"]["peak_memory_bytes"]),
    ):
        yield within(f"plan, peak memory: {stage}, {name}", plans[name][stage], found)


def within(row: str, planned: float, found: float) -> dict[str, object]:
    ratio = planned / found
    return check(row, ratio, "0.8 to 1.2", 0.8 <= ratio <= 1.2, f"planned {planned:,.0f}, was {found:,.0f}")


def planned(config: Config) -> dict[str, float]:
    """Amounts and peaks by name, as `budgetdraft plan` says where nothing has run.

    In a process of its own, which it counts in.
    """
    with tempfile.TemporaryDirectory() as empty:
        file = Path(empty) / "config.yaml"
        file.write_text(dump_config(config.model_copy(update={"storage": str(Path(empty) / "runs")})))
        command = [sys.executable, "-m", "jobs", "plan", str(file), "--json", "--tflops", "1"]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    document = json.loads(text)
    found = {amount["name"]: float(amount["value"]) for amount in document["amounts"]}
    for peak in document["memory"]:
        # Of training the plan names the variant that takes most.
        stage = "train" if peak["stage"].startswith("train ") else peak["stage"]
        found[stage] = float(peak["each"])
    return found


def artifact(study: Study, storage: Path, stage: str) -> Path:
    """The folder of a stage that a study's sweep was made from, or the sweep itself."""
    report = json.loads((study.report / "manifest.json").read_text())
    sweep = storage / f"sweep-{report['inputs']['sweep']}"
    if stage == "sweep":
        return sweep
    return storage / f"{stage}-{json.loads((sweep / 'manifest.json').read_text())['inputs'][stage]}"


def bench_checks(file: Path | None) -> Iterator[dict[str, object]]:
    """The rows of the grid's benchmark, if they were given."""
    for row in json.loads(file.read_text(encoding="utf-8")) if file else []:
        if row["target"] is not None and row["value"] is not None:
            sign = "at most" if row["at_most"] else "at least"
            yield check(row["row"], row["value"], f"{sign} {row['target']:g}", row["met"], row["note"])


if __name__ == "__main__":
    main()
