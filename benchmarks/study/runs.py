"""The runs of a study: made stage by stage, read back, and what their manifests say of them."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.results.summary import Summary
from pipeline.store import layout
from pipeline.store.files import read_all, read_rows
from pipeline.store.layout import AGAIN, CELLS, MANIFEST, PREDICTED, ROWS, RUN_OFF, SUMMARY
from pipeline.store.rows import CellRow, PredictedRow, PromptRow

CONFIGS = ("table-1", "table-2", "figure-3", "adaptive", "table-3", "ablations", "on-policy")
FOLDER = "conf/paper-small"


@dataclass(frozen=True)
class Study:
    """One finished run: its config, its report, its sweep, and the rows of both.

    `run_off` and `again` are the cells that were measured again, `rechecked` the rows of both.
    """

    config: Config
    report: Path
    swept: Path
    summary: Summary
    cells: list[CellRow]
    predicted: list[PredictedRow]
    run_off: list[CellRow]
    again: list[CellRow]
    rows: list[PromptRow]
    rechecked: list[PromptRow]

    @property
    def taught(self) -> Path:
        """The folder of the labels."""
        return self.swept.parent / f"teach-{manifest(self.swept)['inputs']['teach']}"

    @property
    def trained(self) -> list[Path]:
        """The folders of the drafters that were swept."""
        drafters = manifest(self.swept)["inputs"]["drafters"]
        return [self.swept.parent / f"drafter-{name}-{made}" for name, made in drafters.items()]


def study_parser(name: str, about: str | None) -> ArgumentParser:
    """What every study of a config takes on its command line; parse it intermixed, as overrides come last."""
    parser = ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--costs", type=Path, help="rows of `python -m benchmarks --only real`, for the checks"
    )
    parser.add_argument("overrides", nargs="*", help="fields of every config, such as data.root=DIR")
    return parser


def study(file: Path, storage: str, overrides: Sequence[str]) -> Study:
    """Run what is not complete of a config, each stage in a process of its own, and read the results."""
    given = [*overrides, f"storage={json.dumps(storage)}"]
    for stage in ("teach", "train", "sweep"):
        subprocess.run([sys.executable, "-m", "jobs", stage, str(file), *given], check=True)
    config = load_config(file, given)
    report = run_pipeline(config).parent
    swept = Path(storage) / f"sweep-{manifest(report)['inputs']['sweep']}"
    return Study(
        config,
        report,
        swept,
        Summary.model_validate_json((report / SUMMARY).read_text(encoding="utf-8")),
        read_rows(report / CELLS, CellRow),
        read_rows(report / PREDICTED, PredictedRow),
        read_rows(report / RUN_OFF, CellRow),
        read_rows(report / AGAIN, CellRow),
        read_all(swept / ROWS, PromptRow),
        [row for folder in layout.MEASURED_AGAIN for row in read_all(swept / folder, PromptRow)],
    )


def manifest(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def commits(studies: Mapping[str, Study]) -> dict[str, str]:
    """Stage → the commits whose code made the studies' artifacts, with a "+" where files differed from it."""
    by_stage: dict[str, set[str]] = defaultdict(set)
    for run in studies.values():
        target = manifest(run.taught)["inputs"]["target"]
        pretrained = run.swept.parent / f"pretrain-target-{target}"
        folders = {
            "pretrain": [pretrained] if pretrained.exists() else [],
            "teach": [run.taught],
            "train": run.trained,
            "sweep": [run.swept],
        }
        for stage, made in folders.items():
            by_stage[stage] |= {commit_of(manifest(folder)["provenance"]) for folder in made}
    return {stage: ", ".join(sorted(made)) for stage, made in by_stage.items() if made}


def commit_of(provenance: Mapping[str, Any]) -> str:
    return (provenance["git_sha"] or "unknown")[:7] + ("+" if provenance["git_dirty"] else "")
