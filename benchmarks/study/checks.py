"""The study's targets beside the values that it reached: rows for the page and for summary.json."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.page_parts import points
from benchmarks.study.families import student
from benchmarks.study.runs import Study, manifest
from benchmarks.study.tables import explained, headline, when
from pipeline.config.files import dump_config
from pipeline.config.schema import Config
from pipeline.results.summary import FamilyGain, PredictionScore


def check(row: str, value: float | None, target: str, met: bool | None, note: str = "") -> dict[str, object]:
    return {"row": row, "value": value, "target": target, "met": met, "note": note}


def own_checks(grid: Study) -> Iterator[dict[str, object]]:
    """What the run of the whole grid shows by itself."""
    summary = grid.summary
    replayed = summary.replay_check
    yield check(
        "replay = decoding, prompt rows that were both replayed and measured",
        replayed.equal / replayed.rows if replayed.rows else None,
        "1",
        0 < replayed.rows == replayed.equal,
        f"{replayed.equal} of {replayed.rows}; by rounds: tests/pipeline/decode/test_replay.py",
    )
    yield from prediction_checks(summary.prediction)
    for advice in summary.recommendations:
        ratio = None
        if advice.choice and advice.choice.again and advice.best_again and advice.num_again > 1:
            ratio = advice.choice.again.mean / advice.best_again
        yield check(
            f"recommended ÷ best measured speed on fresh repeats, {advice.dataset} {advice.context}",
            ratio,
            "at least 0.95",
            ratio is not None and ratio >= 0.95,
            f"of {advice.num_again} cells; {advice.why}" if advice.choice else advice.why,
        )


def prediction_checks(scores: Sequence[PredictionScore]) -> Iterator[dict[str, object]]:
    """The plane's errors, by steps timed between its prompts; the note gives those by earlier steps."""
    plane = {(s.dataset, s.context): s for s in scores if s.what == "plane"}
    for before in scores:
        if before.what != "plane by earlier steps":
            continue
        note = (
            f"By the steps timed before all measuring, which speeds were predicted from, "
            f"{before.median_error_s:.3f}; autoregressive steps took {before.pace:.2f} times as long as then"
        )
        now = plane.get((before.dataset, before.context))
        yield check(
            f"prediction error of decode time, median, {before.dataset} {before.context}",
            None if now is None else now.median_error_s,
            "at most 0.10",
            now is not None and now.median_error_s <= 0.10,
            f"{now.cells} cells, by single steps timed between their prompts. {note}" if now else note,
        )


def headline_checks(families: Sequence[FamilyGain], pair: tuple[str, str]) -> Iterator[dict[str, object]]:
    """Whether the first family is accepted more than the second behind the smallest budget."""
    for gain in headline(families, pair):
        share, cell = explained(families, gain), gain.cell
        yield check(
            f"{cell.drafter} − {gain.baseline} at B = {cell.budget}, {cell.dataset} {cell.context}, "
            f"{when(gain.cell.temperature)}: lower bound",
            gain.value.low,
            "above 0",
            gain.value.low > 0,
            f"{points(gain.value)} points"
            + (f", {share} of it under other_prompt" if share else "")
            + by_t(gain),
        )


def by_t(gain: FamilyGain) -> str:
    """Student's t over the seeds, which may not show a gain that the documents show; empty for one seed."""
    if len(gain.by_seed) < 2:
        return ""
    low, high = student(gain.by_seed)
    return f"; Student's t over seeds [{100 * low:+.1f}, {100 * high:+.1f}]"


def plan_checks(studies: Mapping[str, Study]) -> Iterator[dict[str, object]]:
    """Amounts and memory by `budgetdraft plan`, before anything has run, against those of the runs.

    A manifest has the peak of the process that finished a stage. For table 1's labels that process pretrained
    the target too, so labelling is compared in a run where nothing is left to pretrain. Table 1's sweep
    replays and measures in one process; its measured rows hold the peak, that of an interrupted process
    included.
    """
    names = ("table-1", "table-2", "table-3", "on-policy")
    plans = {name: planned(studies[name].config) for name in names}
    grid = studies["table-1"]
    sequences = manifest(grid.report / grid.summary.prepared)["counts"]["sequences"]
    swept = {name: manifest(studies[name].swept) for name in ("table-2", "table-3")}
    for name, what, actual in (
        ("table-1", "training tokens", sequences * grid.config.data.sequence_tokens),
        ("table-1", "labels on disk", manifest(grid.taught)["counts"]["label_bytes"]),
        ("table-3", "rows of replay", swept["table-3"]["counts"]["rows"]),
        ("table-2", "rows measured", swept["table-2"]["counts"]["rows"]),
        ("table-1", "rows measured", sum(row.mode == "measure" for row in grid.rows)),
        ("table-1", "rows measured again", len(grid.rechecked)),
    ):
        yield within(f"plan: {what}, {name}", plans[name][what], actual)
    trained = {peak.model: max(peak.ranks) for peak in grid.summary.training_memory}
    drafters = [
        trained[f"drafter-{drafter.name}"] for drafter in grid.config.train.drafters if drafter.steps != 0
    ]
    sweep = max(plans["table-1"][stage] for stage in ("sweep replay", "sweep measure"))
    swept_peak = max(
        peak for row in (*grid.rows, *grid.rechecked) if row.timing and (peak := row.timing.peak_memory_bytes)
    )
    for name, stage, actual in (
        ("table-1", "pretrain target", trained["pretrain-target"]),
        ("on-policy", "teach", manifest(studies["on-policy"].taught)["peak_memory_bytes"]),
        ("table-1", "train", max(drafters)),
        ("table-3", "sweep replay", swept["table-3"]["peak_memory_bytes"]),
        ("table-2", "sweep measure", swept["table-2"]["peak_memory_bytes"]),
    ):
        yield within(f"plan, peak memory: {stage}, {name}", plans[name][stage], actual)
    yield within("plan, peak memory: sweep, replay and measure, table-1", sweep, swept_peak)


def within(row: str, planned: float, actual: float) -> dict[str, object]:
    ratio = planned / actual
    return check(row, ratio, "0.8 to 1.2", 0.8 <= ratio <= 1.2, f"planned {planned:,.0f}, was {actual:,.0f}")


def planned(config: Config) -> dict[str, float]:
    """Amounts and peaks by name, from `budgetdraft plan` on an empty storage.

    Its peaks count the memory of the process that it runs in, so it gets a process of its own.
    """
    with tempfile.TemporaryDirectory() as empty:
        file = Path(empty) / "config.yaml"
        file.write_text(dump_config(config.model_copy(update={"storage": str(Path(empty) / "runs")})))
        command = [sys.executable, "-m", "jobs", "plan", str(file), "--json", "--tflops", "1"]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    document = json.loads(text)
    values = {amount["name"]: float(amount["value"]) for amount in document["amounts"]}
    for peak in document["memory"]:
        # For training, the plan names the variant that takes the most memory.
        stage = "train" if peak["stage"].startswith("train ") else peak["stage"]
        values[stage] = float(peak["each"])
    return values


def bench_checks(file: Path | None) -> Iterator[dict[str, object]]:
    """The rows of the grid's benchmark, if they were given."""
    for row in json.loads(file.read_text(encoding="utf-8")) if file else []:
        if row["target"] is not None and row["value"] is not None:
            sign = "at most" if row["at_most"] else "at least"
            # A row of one repeat has no interval.
            spread = f"[{row['low']:.1f}, {row['high']:.1f}]" if row["low"] < row["high"] else ""
            note = "; ".join(filter(None, (spread, row["note"])))
            yield check(row["row"], row["value"], f"{sign} {row['target']:g}", row["met"], note)
