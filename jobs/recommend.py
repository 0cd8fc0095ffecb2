"""`budgetdraft recommend`: from finished results to what a deployment should use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.artifacts import read_rows
from pipeline.errors import BadData
from pipeline.planner import Place
from pipeline.recommend import Choice, ModelSize, Needs, Recommendation, choices, recommend
from pipeline.report.page import size
from pipeline.report.summary import Summary
from pipeline.rows import CellRow, PredictedRow


def advise(
    results: Path,
    context_tokens: int,
    dataset: str | None,
    memory_gb: float | None,
    concurrency: int,
    min_acceptance: float | None,
) -> Iterator[str]:
    """Lines of text: for every data set what to deploy at a context, or why not to speculate.

    Args:
        results: `summary.json`, or the report folder that holds it.

    Raises:
        BadData: if the results lack what is asked: the context, the data set, speeds, sizes.
    """
    folder = results.parent if results.is_file() else results
    if not (folder / "summary.json").exists():
        raise BadData(f"{results} holds no summary.json: name a report folder, such as runs/report-…")
    summary = Summary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))
    context = context_name(summary, context_tokens)
    sizes = {model.name: model for model in summary.models}
    if memory_gb is not None and "target" not in sizes:
        raise BadData(
            "these results do not say how large the models are, which --memory-gb needs: run the sweep with "
            "mode: both and measure.predict: true"
        )
    predicted = folder / "predicted.jsonl"
    ranked = choices(
        read_rows(folder / "cells.jsonl", CellRow),
        read_rows(predicted, PredictedRow) if predicted.exists() else [],
        summary.least_documents,
    )
    here = {p: found for p, found in ranked.items() if p.context == context and dataset in (None, p.dataset)}
    if not here:
        known = sorted({place.dataset for place in ranked if place.context == context})
        what = f"for data set {dataset!r}; there is {', '.join(known)}" if dataset and known else ""
        raise BadData(f"{folder} has no measured or predicted speed at {context} {what}".rstrip())
    needs = Needs(context_tokens, None if memory_gb is None else memory_gb * 1e9, concurrency, min_acceptance)
    for place, found in sorted(here.items()):
        yield from lines(recommend(place, found, summary.least_documents, needs, sizes), needs, sizes, place)
    if concurrency > 1:
        yield (
            f"Memory is that of {concurrency} prompts at once. Speeds were taken of prompts decoded alone: "
            "decoded together, verification costs more and speculation gains less."
        )


def context_name(summary: Summary, tokens: int) -> str:
    """The context of the results that stands for so many prompt tokens: the next longer one.

    Raises:
        BadData: if all are shorter.
    """
    longer = {name: length for name, length in summary.contexts.items() if length >= tokens * 0.9}
    if not longer:
        known = ", ".join(f"{name} = {length} tokens" for name, length in summary.contexts.items())
        raise BadData(f"--context {tokens} is beyond the contexts of these results: {known}")
    return min(longer, key=lambda name: longer[name])


def lines(advice: Recommendation, needs: Needs, sizes: dict[str, ModelSize], place: Place) -> Iterator[str]:
    yield f"{place.dataset}, {place.context}:"
    if advice.choice is None:
        yield f"  {advice.why}"
    for what, choice in (("deploy", advice.choice), ("runner-up", advice.runner_up)):
        if choice is not None:
            yield f"  {what:<10}{cell_text(choice)}"
            yield f"  {'':<10}{memory_text(choice, needs, sizes)}"


def cell_text(choice: Choice) -> str:
    acceptance = "" if choice.acceptance is None else f", acceptance {100 * choice.acceptance:.1f} %"
    return (
        f"{choice.drafter}, policy {choice.policy}, budget {choice.budget}, γ {choice.gamma}: expected "
        f"{choice.speedup:.2f}× [{choice.speedup_low:.2f}, {choice.speedup_high:.2f}], {choice.basis} over "
        f"{choice.num_documents} documents{acceptance}"
    )


def memory_text(choice: Choice, needs: Needs, sizes: dict[str, ModelSize]) -> str:
    text = f"KV of a prompt: drafter {size(choice.drafter_kv_bytes)}"
    if "target" not in sizes:
        return text
    target = sizes["target"].kv_bytes_per_token * needs.context_tokens
    total = size(needs.bytes_of(choice, sizes))
    return f"{text}, target {size(target)}; with weights and {needs.concurrency} prompt(s) {total}"
