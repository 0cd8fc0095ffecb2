"""A study of windows: run the config of the heads, and that of drafters of the target's layers beside it,
then write the page, `summary.json` with checks, and a figure.

    python -m benchmarks.windows_study conf/smollm2/windows.yaml --layers conf/smollm2/windows-layers.yaml \\
        --output docs/results/windows --costs docs/results/real.json

What is complete in the storage is reused, so that a second call only writes. Every figure comes from the
reports of the runs; nothing is typed in.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import jinja2

from benchmarks.page_parts import check_table
from benchmarks.real_study import tables as parts
from benchmarks.real_study.__main__ import short_summary
from benchmarks.study import speed as speeds
from benchmarks.study.runs import Study, commits, study, study_parser
from benchmarks.windows_study import tables
from benchmarks.windows_study.checks import Grid, all_checks
from pipeline.results.summary import Check
from pipeline.store.files import write_text
from pipeline.store.layout import FIGURES, SUMMARY

FIGURE = "acceptance_by_budget_window.png"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("windows_study", __doc__)
    parser.add_argument("--layers", type=Path, help="config of drafters of the target's layers")
    given = parser.parse_intermixed_args(arguments)
    files = [given.config, *([given.layers] if given.layers else [])]
    heads, *layers = (study(file, given.storage, given.overrides) for file in files)
    checks = all_checks(heads, layers[0] if layers else None, given.costs)
    given.output.mkdir(parents=True, exist_ok=True)
    drawn = heads.report / FIGURES / FIGURE
    if drawn.exists():
        shutil.copyfile(drawn, given.output / "acceptance.png")
    command = " ".join(["python -m benchmarks.windows_study", str(given.config)])
    command += f" --layers {given.layers}" if given.layers else ""
    text = page([heads, *layers], checks, f"{command} --output {given.output}", drawn.exists())
    write_text(given.output / "README.md", text)
    write_text(given.output / SUMMARY, short_summary(heads, checks))
    print(given.output)


def page(runs: Sequence[Study], checks: Sequence[Check], command: str, drawn: bool) -> str:
    """The page of the heads' run, which comes first, and that of the layers beside it if there is one."""
    heads, named = runs[0], [(run.config.drafter.kind, run) for run in runs]
    grids = [(kind, Grid.of(run)) for kind, run in named]
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks.windows_study", "."), undefined=jinja2.StrictUndefined
    ).get_template("page.md.j2")
    config, controls = heads.config, heads.config.sweep.controls
    text = template.render(
        config=config,
        command=command,
        machine=parts.machine(heads),
        commits=commits({run.config.name: run for run in runs}),
        checks=check_table([check.model_dump() for check in checks]),
        gamma=parts.leading_gamma(heads),
        looping=parts.looping_table(heads),
        grids=[
            (kind, parts.when(t), parts.grid_table(run, t))
            for kind, run in named
            for t in run.config.sweep.temperatures
        ],
        specialists=tables.specialists_table(grids[0][1]),
        first=tables.first_table(grids),
        training=tables.training_table(named),
        context=tables.context_table(grids[0][1]) if "other_prompt" in controls else "",
        timed=any(row.speed for row in heads.cells),
        ar=speeds.ar_table(heads.summary.ar_tokens_per_s),
        measured=speeds.measured_table([cell for run in runs for cell in run.cells]),
        drawn=drawn,
    )
    return text + "\n"


if __name__ == "__main__":
    main()
