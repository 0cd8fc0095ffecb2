"""The paper's experiments at the scale of two cores: run every config, then write tables, figures and checks.

    python -m benchmarks.study --storage runs --output docs/results/paper-small

What is complete in the storage is reused, so that a second call only writes. Every figure comes from the
reports of the runs; nothing is typed in. Each stage runs in a process of its own, whose peak memory is then
the stage's; where nothing is pretrained yet, `teach` does that too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.study import checks as checked
from benchmarks.study import tables
from benchmarks.study.runs import CONFIGS, FOLDER, study
from pipeline.store import layout
from pipeline.store.files import write_text
from pipeline.store.layout import SUMMARY

FIGURES = {
    "table-1": "acceptance_by_budget_chunk_topk",
    "table-2": "speedup_by_context",
    "figure-3": "speedup_by_gamma",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results/paper-small"))
    parser.add_argument(
        "--grid", type=Path, help="bench.json with the rows of `python -m benchmarks --only grid`"
    )
    parser.add_argument("overrides", nargs="*", help="fields of every config, such as run.executor=inline")
    given = parser.parse_args()
    studies = {name: study(Path(FOLDER) / f"{name}.yaml", given.storage, given.overrides) for name in CONFIGS}
    checks = [
        *checked.own_checks(studies["table-1"]),
        *checked.headline_checks(studies["table-1"].summary.families, tables.PAPER),
        *checked.headline_checks(studies["ablations"].summary.families, tables.KL),
        *checked.plan_checks(studies),
        *checked.bench_checks(given.grid),
    ]
    given.output.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        shutil.copyfile(studies[name].report / layout.FIGURES / f"{figure}.png", given.output / f"{name}.png")
    write_text(given.output / "README.md", tables.page(studies, checks))
    summary = studies["table-1"].summary.model_dump(mode="json")
    kl = tables.headline(studies["ablations"].summary.families, tables.KL)
    summary["families"] += [gain.model_dump(mode="json") for gain in kl]
    # With every γ and all digits the file would be megabytes large; the run's own summary has them.
    for name in ("acceptance", "headline", "families", "controls"):
        summary[name] = [row for row in summary[name] if row["cell"]["gamma"] == tables.GAMMA]
    short = json.loads(json.dumps({**summary, "checks": checks}), parse_float=lambda x: round(float(x), 6))
    text = json.dumps(short, separators=(",", ":"), ensure_ascii=False)
    write_text(given.output / SUMMARY, text + "\n")
    print(given.output)


if __name__ == "__main__":
    main()
