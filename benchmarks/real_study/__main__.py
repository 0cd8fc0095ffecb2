"""A study of a real target: run its config, then write its page, its figures, `summary.json` with checks and
what the target answered.

    python -m benchmarks.real_study conf/smollm2/study.yaml --output docs/results/smollm2 \\
        --costs docs/results/real.json

What is complete in the storage is reused, so that a second call only writes. Every figure comes from the
report of the run; nothing is typed in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jinja2

from benchmarks.page_parts import check_table
from benchmarks.real_study import answers, tables
from benchmarks.real_study.checks import all_checks
from benchmarks.study import speed as speeds
from benchmarks.study.runs import Study, commits, study, study_parser
from pipeline.config.schema import Config
from pipeline.results.summary import Check
from pipeline.store import layout
from pipeline.store.files import write_text
from pipeline.store.layout import SUMMARY

FIGURES = {"acceptance": "acceptance_by_budget_chunk_topk", "speed": "speedup_by_gamma"}


def main(arguments: Sequence[str] | None = None) -> None:
    given = study_parser("real_study", __doc__).parse_intermixed_args(arguments)
    run = study(given.config, given.storage, given.overrides)
    checks = all_checks(run, given.costs)
    given.output.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, figure in FIGURES.items():
        source = run.report / layout.FIGURES / f"{figure}.png"
        if source.exists():
            shutil.copyfile(source, given.output / f"{name}.png")
            drawn[name] = f"{name}.png"
    if run.config.data.asks:
        answers.collect(run.taught, given.output / answers.FILE, target_name(run.config))
    write_text(given.output / "README.md", page(run, checks, given.config, given.output, drawn))
    write_text(given.output / SUMMARY, short_summary(run, checks))
    print(given.output)


def target_name(config: Config) -> str:
    return Path(config.target.path).name if config.target.kind == "pretrained" else "a toy"


def page(run: Study, checks: list[Check], file: Path, output: Path, figures: dict[str, str]) -> str:
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("benchmarks.real_study", "."), undefined=jinja2.StrictUndefined
    ).get_template("page.md.j2")
    config = run.config
    return (
        template.render(
            config=config,
            file=file,
            output=output,
            machine=tables.machine(run),
            commits=commits({run.config.name: run}),
            checks=check_table([check.model_dump() for check in checks]),
            gamma=tables.leading_gamma(run),
            smallest=tables.smallest(run),
            costs=tables.costs(run),
            answers=answers.FILE if config.data.asks else None,
            looping=tables.looping_table(run),
            in_short=tables.in_short(run),
            timed=any(row.speed for row in run.cells),
            headline=tables.headline_table(run),
            headline_words=tables.headline_words(run),
            grids=[(tables.when(t), tables.grid_table(run, t)) for t in config.sweep.temperatures],
            context_use=tables.context_table(run),
            ar=speeds.ar_table(run.summary.ar_tokens_per_s),
            measured=speeds.measured_table(run.cells),
            advice=tables.advice_table(run),
            figures=figures,
        )
        + "\n"
    )


def short_summary(run: Study, checks: list[Check]) -> str:
    """The run's summary with the checks; of γ only the one of the page, and six digits of every figure."""
    summary, gamma = run.summary.model_dump(mode="json"), tables.leading_gamma(run)
    for name in ("acceptance", "headline", "families", "controls"):
        summary[name] = [row for row in summary[name] if row["cell"]["gamma"] == gamma]
    content = {**summary, "checks": [check.model_dump() for check in checks]}
    short = json.loads(json.dumps(content), parse_float=lambda x: round(float(x), 6))
    return json.dumps(short, separators=(",", ":"), ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
