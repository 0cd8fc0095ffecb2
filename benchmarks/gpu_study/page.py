"""The page of the study on a GPU, from its finished report and `bench.json`; only the notes are typed in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.gpu.decoding import PAPER_POINTS
from benchmarks.page_parts import acceptance, check_table, end_to_end, interval_text, points, speed
from jobs.stages.pipeline import run_pipeline, settled
from pipeline.axes import Cell
from pipeline.config.schema import Config
from pipeline.markdown import table
from pipeline.results.summary import Check, Summary
from pipeline.store import layout
from pipeline.store.files import read_all, read_rows, write_text
from pipeline.store.layout import ROWS, SUMMARY
from pipeline.store.rows import CellRow, PromptRow

PAIR, BASELINE = "multi_view", "full_only"
LEAST_GAP, LEAST_SPEEDUP = 0.03, 1.5
FIGURES = ("acceptance_by_budget_chunk_topk", "speedup_by_context")


def write_page(config: Config, bench: Path, notes: Path, output: Path) -> None:
    """`README.md`, `summary.json`, `bench.json` and figures into `output`.

    Args:
        bench: what `python -m benchmarks --only gpu` wrote on the same GPU.
        notes: Markdown, what was tried and did not work.
    """
    config = settled(config)
    report = run_pipeline(config).parent
    summary = Summary.model_validate_json((report / SUMMARY).read_text(encoding="utf-8"))
    cells = read_rows(report / "cells.jsonl", CellRow)
    made = json.loads((report / "manifest.json").read_text(encoding="utf-8"))
    sweep = Path(config.storage) / f"sweep-{made['inputs']['sweep']}"
    rows = read_all(sweep / ROWS, PromptRow)
    system = json.loads(bench.read_text(encoding="utf-8"))
    # The largest γ that is also decoded: acceptance falls with γ.
    gamma = max(config.sweep.measure.gammas or config.sweep.gammas)
    smallest = min(budget for budget in config.sweep.budgets if budget != "full")
    checks = [
        *gains(summary, smallest, gamma),
        *gaps(summary, smallest, gamma),
        *speedups(cells),
        *system_checks(system),
    ]
    output.mkdir(parents=True, exist_ok=True)
    drawn = [name for name in FIGURES if (report / layout.FIGURES / f"{name}.png").exists()]
    for name in drawn:
        shutil.copyfile(report / layout.FIGURES / f"{name}.png", output / f"{name}.png")
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks.gpu_study", "."), undefined=jinja2.StrictUndefined
    ).get_template("page.md.j2")
    page = template.render(
        config=config,
        hardware=sorted({row.timing.hardware for row in rows if row.timing and row.timing.hardware}),
        made=json.loads((sweep / "manifest.json").read_text(encoding="utf-8"))["provenance"],
        gamma=gamma,
        checks=check_table([check.model_dump() for check in checks]),
        accepted=accepted_table(cells, gamma),
        measured=measured_table(cells),
        system=system_table(system),
        paper=paper_table(system),
        figures=drawn,
        findings=summary.findings,
        notes=notes.read_text(encoding="utf-8").strip(),
    )
    write_text(output / "README.md", page + "\n")
    whole = summary.model_copy(update={"checks": tuple(checks)})
    write_text(output / SUMMARY, whole.model_dump_json() + "\n")
    shutil.copyfile(bench, output / "bench.json")


# ── what was to be reached ────────────────────────────────────────────────────────────────────────


def gains(summary: Summary, smallest: int, gamma: int) -> Iterator[Check]:
    """`multi_view` against `full_only` behind the smallest budget, in every place."""
    for gain in summary.headline:
        if (gain.cell.drafter, gain.baseline, gain.cell.budget) != (PAIR, BASELINE, smallest):
            continue
        if gain.cell.control is None and gain.cell.gamma == gamma and gain.prompts == "all":
            yield Check(
                row=f"{PAIR} − {BASELINE}, B = {smallest}, {place(gain.cell)}: lower bound",
                value=gain.value.low,
                target="above 0",
                met=gain.value.low > 0,
                note=f"{points(gain.value)} points, {gain.num_documents} documents",
            )


def gaps(summary: Summary, smallest: int, gamma: int) -> Iterator[Check]:
    """`multi_view` against itself behind another document's KV."""
    for gap in summary.controls:
        if (gap.cell.drafter, gap.cell.budget, gap.cell.control, gap.cell.gamma) == (
            PAIR,
            smallest,
            "other_prompt",
            gamma,
        ):
            yield Check(
                row=f"{PAIR} − its own other_prompt, B = {smallest}, {place(gap.cell)}",
                value=gap.value.mean,
                target=f"at least {LEAST_GAP}",
                met=gap.value.mean >= LEAST_GAP,
                note=f"{points(gap.value)} points, {gap.num_documents} documents",
            )


def speedups(cells: Sequence[CellRow]) -> Iterator[Check]:
    """The fastest measured cell of the trained pair at every context and temperature."""
    timed = [(row.cell, row.speed.speedup) for row in cells if row.speed and row.cell.drafter == PAIR]
    for context, temperature in dict.fromkeys((cell.context, cell.temperature) for cell, _ in timed):
        here = [(c, s) for c, s in timed if (c.context, c.temperature) == (context, temperature)]
        best, speedup = max(here, key=lambda cell_and_speedup: cell_and_speedup[1].mean)
        yield Check(
            row=f"decode speed ÷ our own AR, {context}, temperature {temperature:g}",
            value=speedup.mean,
            target=f"above {LEAST_SPEEDUP}",
            met=speedup.mean > LEAST_SPEEDUP,
            note=f"{interval_text(speedup)}; the fastest of {len(here)} cells: {best.dataset}, "
            f"B = {best.budget}, γ = {best.gamma}",
        )


def system_checks(system: Sequence[dict[str, Any]]) -> Iterator[Check]:
    for row in system:
        if row["target"] is not None:
            sign = "at most" if row["at_most"] else "at least"
            target = f"{sign} {row['target']:g}"
            yield Check(row=row["row"], value=row["value"], target=target, met=row["met"], note=row["note"])


def place(cell: Cell) -> str:
    return f"{cell.dataset} {cell.context}, temperature {cell.temperature:g}"


# ── tables ────────────────────────────────────────────────────────────────────────────────────────


def accepted_table(cells: Sequence[CellRow], gamma: int) -> str:
    """Every drafter by place and budget, replayed or expected, with and without its own prefix."""
    here = [cell for cell in cells if cell.mode != "measure" and cell.cell.gamma == gamma]
    drafters = list(dict.fromkeys((cell.cell.drafter, cell.cell.control) for cell in here))
    by_key = {
        (c.cell.dataset, c.cell.context, c.cell.temperature, c.cell.budget, c.cell.drafter, c.cell.control): c
        for c in here
    }
    heads = [name if control is None else f"{name}, {control}" for name, control in drafters]
    rows = []
    for key in dict.fromkeys(
        (c.cell.dataset, c.cell.context, c.cell.temperature, c.cell.budget) for c in here
    ):
        shown = [by_key.get((*key, *drafter)) for drafter in drafters]
        first = next(cell for cell in shown if cell)
        texts = [f"{first.num_looping} of {first.num_prompts}", *map(acceptance, shown)]
        rows.append([*key[:2], f"{key[2]:g}", key[3], *texts])
    return table(["data", "context", "temperature", "B", "looping", *heads], rows)


def measured_table(cells: Sequence[CellRow]) -> str:
    head = ["data", "context", "temperature", "drafter", "B", "γ", "acceptance", "speedup", "end to end",
            "AR tokens/s", "peak memory, MiB", "exact"]  # fmt: skip
    return table(
        head,
        [
            [
                c.cell.dataset, c.cell.context, f"{c.cell.temperature:g}", c.cell.drafter, c.cell.budget,
                c.cell.gamma, acceptance(c), speed(c), end_to_end(c),
                f"{c.speed.ar_tokens_per_s if c.speed else 0:.0f}",
                f"{(c.peak_memory_bytes or 0) / 2**20:.0f}",
                f"{c.exact_prompts} of {c.num_prompts}" if c.exact_prompts is not None else "",
            ]
            for c in cells
            if c.mode == "measure"
        ],
    )  # fmt: skip


def system_table(system: Sequence[dict[str, Any]]) -> str:
    return table(
        ["what", "value", "note"],
        [
            [
                row["row"],
                f"{row['value']:.3g}{row['unit']} [{row['low']:.3g}, {row['high']:.3g}]",
                row["note"],
            ]
            for row in system
            if row["value"] is not None
        ],
    )


def paper_table(system: Sequence[dict[str, Any]]) -> str:
    """The paper's speedup at each context, beside that of the best γ here at the paper's acceptance."""
    rows = []
    for point in PAPER_POINTS:
        ours = [
            row
            for row in system
            if row["synthetic"] and f", {point.name}, " in row["row"] and "best γ" in row["note"]
        ]
        texts = [f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in ours if row["value"]]
        rows.append(
            [point.name, f"{point.acceptance:g}", point.gamma, f"{point.claimed:.2f}", "; ".join(texts)]
        )
    return table(["context", "acceptance", "the paper's γ", "its speedup", "here, best γ, synthetic"], rows)
