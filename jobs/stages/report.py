"""Stage report: cells, figures and summary from the sweep's rows, and the page that shows them.

The figures of a sweep never change, so they are cached like any artifact: `cells.jsonl`, `analysis.json` and
`figures/`. `summary.json` and `report.html` also tell about the present run (its stages, its command), so
every run writes these two anew, beside the cached files and outside the manifest's checksums.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.axes import Place
from pipeline.config.schema import Config
from pipeline.errors import hide_credentials
from pipeline.models.draft_vocabulary import read_draft_tokens
from pipeline.report.page import PageInputs, render
from pipeline.results.findings import summarise
from pipeline.results.pool import Axes, cell_rows
from pipeline.results.scores import Predictions
from pipeline.results.summary import Coverage, RankMemory, Stage, Summary
from pipeline.store import layout
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.files import file_sha256, read_all, read_rows, write_json, write_rows, write_text
from pipeline.store.layout import (
    AGAIN,
    ANALYSIS,
    CELLS,
    CONTINUATIONS,
    FAILED,
    FIGURES,
    MODEL,
    PAGE,
    PREDICTED,
    ROWS,
    RUN_OFF,
    SIZES,
    STEPS,
    STEPS_BESIDE,
    SUMMARY,
)
from pipeline.store.provenance import provenance
from pipeline.store.rows import (
    CellRow,
    Continuation,
    FailedCell,
    ModelSize,
    PredictedRow,
    PromptRow,
    StepTimes,
)
from pipeline.sweep import predict

log = logging.getLogger(__name__)

# To be raised when fields of analysis.json or cells.jsonl change, or what they mean: reports of older code
# are then drawn anew.
ANALYSIS_FORMAT = 3


@dataclass(frozen=True)
class ReportInputs:
    """Artifacts that the report reads, and this run's earlier stages in order.

    The sweep may be incomplete: its failures are part of the report. `trained` are the models of stages
    pretrain and train, `sampled` the target's sampled texts where the sweep has some.
    """

    prepare: Artifact
    teach: Artifact
    sweep: Artifact
    stages: Sequence[Stage]
    trained: Sequence[Artifact] = ()
    sampled: Artifact | None = None


def report(config: Config, inputs: ReportInputs) -> Artifact:
    """Make the report; its folder holds `report.html`, `summary.json`, `cells.jsonl` and `figures/*.png`."""
    began = time.perf_counter()
    failed = read_all(inputs.sweep.path / FAILED, FailedCell)
    artifact, cached = _analyse(config, inputs, failed)
    analysis = Summary.model_validate_json((artifact.path / ANALYSIS).read_text(encoding="utf-8"))
    this_stage = Stage(name="report", seconds=round(time.perf_counter() - began, 3), cached=cached)
    memory = training_memory(inputs.trained)
    continuations = read_all(inputs.teach.path / CONTINUATIONS, Continuation)
    sampled = read_all(inputs.sampled.path / CONTINUATIONS, Continuation) if inputs.sampled else []
    run = {
        "config": config.name,
        "prepared": os.path.relpath(inputs.prepare.path, artifact.path),
        "stages": (*inputs.stages, this_stage),
        "training_memory": memory,
        "coverage": coverage(inputs.trained, [*continuations, *sampled]),
    }
    summary = analysis.model_copy(update=run)
    page = PageInputs(
        config=config,
        summary=summary,
        cells=read_rows(artifact.path / CELLS, CellRow),
        predicted=read_rows(artifact.path / PREDICTED, PredictedRow),
        failed=failed,
        continuations=continuations,
        figures=artifact.manifest["counts"]["figures"],
        figure_folder=artifact.path / FIGURES,
        prepare=inputs.prepare.manifest,
        sweep=inputs.sweep.manifest if inputs.sweep.complete else None,
        provenance=provenance(),
        command=hide_credentials(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
    )
    write_text(artifact.path / PAGE, render(page))
    write_json(artifact.path / SUMMARY, summary.model_dump(mode="json"))
    log.info("report: %s", artifact.path / PAGE)
    return artifact


def _analyse(config: Config, inputs: ReportInputs, failed: Sequence[FailedCell]) -> tuple[Artifact, bool]:
    """The cached part: the artifact, complete, and whether it was there already."""
    axes = Axes.of(config)
    # By content: a sweep that is tried again after failures keeps its fingerprint and gains rows.
    rows = {
        str(file.relative_to(inputs.sweep.path)): file_sha256(file)
        for folder in (ROWS, *layout.MEASURED_AGAIN, STEPS, STEPS_BESIDE, FAILED)
        for file in sorted((inputs.sweep.path / folder).glob("*.jsonl"))
    }
    identity = {
        "format": ANALYSIS_FORMAT,
        "sweep": inputs.sweep.fingerprint,
        "rows": rows,
        "axes": asdict(axes),
        "samples": config.report.bootstrap_samples,
        "seed": config.seed,
    }
    artifact = open_artifact(Path(config.storage), "report", identity)
    with artifact.claim() as unfinished:
        if unfinished:
            _draw(config, inputs, failed, axes, artifact, identity)
        return artifact, not unfinished


def _draw(
    config: Config,
    inputs: ReportInputs,
    failed: Sequence[FailedCell],
    axes: Axes,
    artifact: Artifact,
    identity: dict[str, Any],
) -> None:
    """Tables, findings and figures from the rows."""
    from pipeline.report.figures import draw_all  # matplotlib is slow to import

    began = time.perf_counter()
    samples, seed = config.report.bootstrap_samples, config.seed
    prompt_rows = read_all(inputs.sweep.path / ROWS, PromptRow)
    log.info("report: %d prompt rows, %d failures", len(prompt_rows), len(failed))
    cells = cell_rows(prompt_rows, axes, samples, seed)
    predictions = read_predictions(config, inputs.sweep.path)
    summary = summarise(prompt_rows, cells, failed, axes, samples, seed, predictions)
    write_rows(artifact.path / CELLS, cells)
    write_rows(artifact.path / PREDICTED, list(predictions.predicted))
    write_rows(artifact.path / RUN_OFF, list(predictions.run_off))
    write_rows(artifact.path / AGAIN, list(predictions.again))
    of_the_run = {"config", "prepared", "stages"}
    write_json(artifact.path / ANALYSIS, summary.model_dump(mode="json", exclude=of_the_run))
    figures = draw_all(cells, summary.acceptance, axes, artifact.path / FIGURES)
    counts = {"cells": len(cells), "failed": len(failed), "figures": figures}
    artifact.finish(identity, counts, time.perf_counter() - began, leave_out=(SUMMARY, PAGE))


def training_memory(trained: Sequence[Artifact]) -> tuple[RankMemory, ...]:
    """Peak memory from the manifests of trained models; models that were exported untrained have none."""
    counts = {artifact.stage: artifact.manifest["counts"] for artifact in trained}
    return tuple(
        RankMemory(model=name, ranks=ranks)
        for name, known in counts.items()
        if (ranks := known.get("peak_memory_bytes_by_rank"))
    )


def coverage(trained: Sequence[Artifact], continuations: Sequence[Continuation]) -> tuple[Coverage, ...]:
    """What the drafters' draft vocabulary holds of each place's test texts, the greedy ones and those sampled
    at each temperature apart; () where there is none.

    All drafters of a run have the same one. The token that the prefill gives is never proposed.
    """
    found = (read_draft_tokens(artifact.path / MODEL) for artifact in trained)
    tokens_D = next((tokens for tokens in found if tokens is not None), None)
    if tokens_D is None:
        return ()
    texts: dict[tuple[Place, float], list[int]] = defaultdict(list)
    for text in continuations:
        if text.split == "test":
            texts[Place(text.dataset, text.context), text.temperature] += text.tokens[1:]
    inside = frozenset(tokens_D.tolist())
    return tuple(
        Coverage(
            dataset=place.dataset,
            context=place.context,
            share=sum(token in inside for token in tokens) / len(tokens),
            tokens=len(tokens),
            temperature=temperature,
        )
        for (place, temperature), tokens in texts.items()
        if tokens
    )


def read_predictions(config: Config, sweep: Path) -> Predictions:
    """Predictions and their measurements in a sweep's folder; empty if there are none, or none yet."""
    predicted, sizes = sweep / PREDICTED, sweep / SIZES
    axes, samples = Axes.of(config), config.report.bootstrap_samples
    rechecked = [read_all(sweep / folder, PromptRow) for folder in layout.MEASURED_AGAIN]
    run_off, again = (cell_rows(rows, axes, samples, config.seed) for rows in rechecked)
    return Predictions(
        read_rows(predicted, PredictedRow) if predicted.exists() else (),
        read_all(sweep / STEPS, StepTimes),
        read_rows(sizes, ModelSize) if sizes.exists() else (),
        run_off,
        again,
        rechecked,
        config.sweep.measure.plane,
        predict.mean_step_times(read_all(sweep / STEPS_BESIDE, StepTimes)),
    )
