"""`report.html`: one file that needs nothing else, not even JavaScript.

What is written here is arranged from the summary, the cells and the manifests; nothing is computed anew. All
texts go through jinja2's autoescape: data, errors and model output are shown, never interpreted.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from pipeline.axes import budget_order
from pipeline.config.models import AnyDrafter, FirstLayers, Head, PretrainedModel
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.report.published import CAVEAT, ar_beside, published_beside
from pipeline.results.axes import Axes
from pipeline.results.brief import answers
from pipeline.results.lossy import WARNING
from pipeline.results.recommend import settings_text
from pipeline.results.summary import Estimate, Summary
from pipeline.store.rows import CellRow, Continuation, FailedCell, PredictedRow
from pipeline.sweep.picks import by_place
from pipeline.units import binary_size

MOST_CELLS = 500
MOST_FAILED = 100
MOST_PREDICTED = 12  # of a place
MOST_SAMPLE_CHARS = 1500
# Sources that stand for a published data set: local files of the same form need not be that set.
PUBLISHED = {"pg19": "PG-19", "longbench": "LongBench", "lwm": "NarrativeQA"}
CAPTIONS = {
    "acceptance_by_budget": "Acceptance against the drafter's budget. Bands are 95 % intervals over "
    "documents.",
    "speedup_by_context": "Decode speedup against context length. Bars are 95 % intervals over documents.",
    "speedup_by_gamma": "Decode speedup against γ. Bars are 95 % intervals over documents.",
    "speedup_by_memory": "Decode speedup against the drafter's KV memory; the target's for comparison. Bars "
    "are 95 % intervals over documents.",
}


@dataclass(frozen=True)
class PageInputs:
    """All that a page shows. `sweep` and `prepare` are manifests, `sweep` None where it is incomplete."""

    config: Config
    summary: Summary
    cells: Sequence[CellRow]
    predicted: Sequence[PredictedRow]
    failed: Sequence[FailedCell]
    continuations: Sequence[Continuation]
    figures: dict[str, str]  # name → "" or why it was not drawn
    figure_folder: Path
    prepare: dict[str, Any]
    sweep: dict[str, Any] | None
    provenance: dict[str, Any]
    command: str


@dataclass(frozen=True)
class Matrix:
    """Acceptance in one place at one γ: a row a drafter and control, a column a budget."""

    title: str
    budgets: list[str]
    rows: list[tuple[str, list[Estimate | None]]]


@dataclass(frozen=True)
class Sample:
    continuation: Continuation
    looping: bool
    text: str
    cut: int  # characters left off


def render(inputs: PageInputs) -> str:
    """The page as HTML text."""
    config, axes = inputs.config, Axes.of(inputs.config)
    exact = [row for row in inputs.cells if not row.cell.lossy]
    gains, families = inputs.summary.headline, inputs.summary.families
    return _template().render(
        name=config.name,
        axes=axes,
        setup=_setup(config),
        sources=_sources(inputs.prepare),
        contexts=config.data.contexts,
        max_new_tokens=config.data.max_new_tokens,
        summary=inputs.summary,
        answers=answers(inputs.summary, inputs.cells),
        gains=[gain for gain in gains if gain.cell.gamma == axes.gamma],
        other_gains=[gain for gain in gains if gain.cell.gamma != axes.gamma],
        families=[gain for gain in families if gain.cell.gamma == axes.gamma],
        other_families=[gain for gain in families if gain.cell.gamma != axes.gamma],
        controls=[gap for gap in inputs.summary.controls if gap.cell.gamma == axes.gamma],
        matrices=_matrices(inputs.summary.acceptance, inputs.cells, axes),
        predicted=_fastest(inputs.predicted),
        num_predicted=len(inputs.predicted),
        measured=[row for row in exact if row.speed][:MOST_CELLS],
        lossy=[row for row in inputs.cells if row.cell.lossy],
        lossy_warning=WARNING,
        cells=exact[:MOST_CELLS],
        sampled=any(cell.cell.temperature > 0 for cell in inputs.cells),
        adaptive=any(cell.cell.threshold > 0 for cell in inputs.cells),
        decode=config.decode,
        num_cells=len(exact),
        failed=inputs.failed[:MOST_FAILED],
        num_failed=len(inputs.failed),
        figures=[_figure(name, why, inputs.figure_folder) for name, why in inputs.figures.items()],
        samples=_samples(inputs.continuations, config),
        looping_rate=config.sweep.looping_rate,
        measurement=_measurement(inputs),
        beside=published_beside(config, inputs.cells, inputs.predicted),
        ar_beside=ar_beside(config, inputs.summary.ar_tokens_per_s),
        caveat=CAVEAT,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "signed": signed, "times": times, "size": binary_size}
    environment.filters["settings"] = settings_text
    return environment.get_template("page.html.j2")


def _fastest(predicted: Sequence[PredictedRow]) -> list[PredictedRow]:
    return [row for here in by_place(predicted).values() for row in here[:MOST_PREDICTED]]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _setup(config: Config) -> list[tuple[str, str]]:
    """Models and variants in words."""
    setup = [
        ("target", _model_text(config.target, config.target.dtype)),
        ("drafter", _model_text(config.drafter, config.drafter_dtype)),
    ]
    if config.train.draft_vocabulary is not None:
        setup.append(("draft vocabulary", f"the {config.train.draft_vocabulary} most frequent labels"))
    return setup + [
        (f"variant {v.name}", _variant_text(v, config.train.steps_of(v))) for v in config.train.drafters
    ]


def _model_text(model: AnyDrafter, dtype: str) -> str:
    if isinstance(model, FirstLayers):
        layers = ", ".join(map(str, model.layers))
        return f"the target's layers {layers} between its own embedding and head, {dtype}"
    if isinstance(model, Head):
        layers = (
            ", ".join(map(str, model.feature_layers or ())) or "2, the middle one and the third from the end"
        )
        return f"one layer over the target's hidden states, which its layers {layers} read, {dtype}"
    if isinstance(model, PretrainedModel):
        return f"{model.path}{f' at {model.revision}' if model.revision else ''}, {dtype}"
    return (
        f"built and pretrained here for {model.pretrain.steps} steps: depth {model.layers}, "
        f"width {model.hidden}, heads {model.heads}, KV heads {model.kv_heads}, {dtype}"
    )


def _variant_text(variant: Variant, steps: int) -> str:
    if steps == 0:
        return "not trained on labels"
    text = f"{steps} steps, {variant.full_weight:g} × L_A ({variant.full_loss})"
    if variant.sparse_weight:
        budgets = ", ".join(f"{budget}: {weight:g}" for budget, weight in variant.budgets.items())
        text += (
            f" + {variant.sparse_weight:g} × L_C ({variant.sparse_loss}, {variant.policy}, "
            f"budgets with their weights {budgets})"
        )
    return text


def _sources(prepare: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, what it is, caveat) of every data source, from the prepare manifest."""
    sources = []
    for name, source in prepare["counts"]["sources"].items():
        what = f"kind {source['kind']}, from {source['from']}"
        caveat = ""
        if source["num_files"]:
            what += f": {source['num_files']} files, {binary_size(source['bytes'])}"
            what += "".join(f"; {file['path']}" for file in source["files"][:3])
            what += "; …" if source["num_files"] > 3 else ""
            if source["kind"] in PUBLISHED:
                published = PUBLISHED[source["kind"]]
                caveat = (
                    f"Local files in the form of {published}. Unless they are its official files, figures on "
                    f"them are not {published} figures."
                )
        sources.append((name, what, caveat))
    return sources


def _matrices(acceptance: Sequence[Estimate], cells: Sequence[CellRow], axes: Axes) -> list[Matrix]:
    estimated = {(c.cell.dataset, c.cell.context, c.cell.temperature) for c in cells if c.mode == "estimate"}
    places: dict[tuple[str, str, str, float, int], list[Estimate]] = {}
    for e in acceptance:
        if e.cell.gamma == axes.gamma:
            places.setdefault(
                (e.cell.dataset, e.cell.context, e.cell.policy, e.cell.temperature, e.cell.seed), []
            ).append(e)
    matrices = []
    for (dataset, context, policy, temperature, seed), here in places.items():
        budgets = sorted({e.cell.budget for e in here}, key=budget_order)
        lines: dict[str, list[Estimate | None]] = {}
        for e in here:
            label = f"{e.cell.drafter}, control {e.cell.control}" if e.cell.control else e.cell.drafter
            lines.setdefault(label, [None] * len(budgets))[budgets.index(e.cell.budget)] = e
        sampling = f", temperature {temperature:g}, seed {seed}" if temperature else ""
        title = f"{dataset}, {context}, {policy}{sampling}"
        if temperature and (dataset, context, temperature) in estimated:
            title += " (expected over sampled texts: an estimate)"
        matrices.append(Matrix(title, [str(budget) for budget in budgets], list(lines.items())))
    return matrices


def _figure(name: str, why: str, folder: Path) -> tuple[str, str, str]:
    """(caption, data URI or "", why it was not drawn)."""
    kind = next(kind for kind in CAPTIONS if name.startswith(kind))
    if why:
        return CAPTIONS[kind], "", why
    image = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
    return CAPTIONS[kind], f"data:image/png;base64,{image}", ""


def _samples(continuations: Sequence[Continuation], config: Config) -> list[Sample]:
    """Per data set, texts spread evenly from the least to the most repetitive."""
    samples = []
    for dataset in Axes.of(config).datasets:
        texts = sorted(
            (c for c in continuations if c.dataset == dataset and c.split == "test"),
            key=lambda c: (c.repetition_rate, c.context, c.prompt_id),
        )
        count = min(config.report.samples, len(texts))
        for index in np.linspace(0, len(texts) - 1, count).round().astype(int):
            text = texts[index].text
            samples.append(
                Sample(
                    texts[index],
                    texts[index].repetition_rate > config.sweep.looping_rate,
                    text[:MOST_SAMPLE_CHARS],
                    max(len(text) - MOST_SAMPLE_CHARS, 0),
                )
            )
    return samples


def _measurement(inputs: PageInputs) -> list[tuple[str, str]]:
    """Where the figures come from: the sweep's machine and code, then the page's own code."""
    made = inputs.sweep["provenance"] if inputs.sweep else inputs.provenance
    rows = [("sweep", inputs.sweep["created"] if inputs.sweep else "incomplete: the rows so far are shown")]
    if inputs.sweep:
        rows.append(("device", str(inputs.sweep["inputs"]["device"])))
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items() if version)
    return [
        *rows,
        ("machine", f"{made['platform']}, {made['cpus']} CPUs"),
        ("code of the sweep", _code_text(made)),
        ("code of this page", _code_text(inputs.provenance)),
        ("versions", f"Python {made['python']}, {versions}"),
        ("command", inputs.command),
    ]


def _code_text(provenance: dict[str, Any]) -> str:
    if provenance["git_sha"] is None:
        return "not in a git checkout"
    return f"{provenance['git_sha']}{', with uncommitted changes' if provenance['git_dirty'] else ''}"
