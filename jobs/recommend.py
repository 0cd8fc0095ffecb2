"""`budgetdraft recommend`: from finished results to what a deployment should use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from jobs.report import AGAIN, CELLS, SUMMARY
from pipeline.artifacts import read_rows
from pipeline.errors import BadData
from pipeline.planner import Place
from pipeline.recommend import Choice, ModelSize, Needs, Recommendation, choices, recommend
from pipeline.report.page import size
from pipeline.report.summary import Summary
from pipeline.rows import CellRow


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
    summary = read_summary(folder)
    context = context_name(summary, context_tokens)
    sizes = {model.name: model for model in summary.models}
    if memory_gb is not None and "target" not in sizes:
        raise BadData(
            "these results do not say how large the models are, which --memory-gb needs: run the sweep with "
            "mode: both and measure.predict: true"
        )
    ranked = choices(read_rows(folder / CELLS, CellRow), read_rows(folder / AGAIN, CellRow))
    here = {p: found for p, found in ranked.items() if p.context == context and dataset in (None, p.dataset)}
    if not here:
        known = sorted({place.dataset for place in ranked if place.context == context})
        what = f" for data set {dataset!r}; there is {', '.join(known)}" if dataset and known else ""
        raise BadData(f"{folder} has no measured speed at {context}{what}")
    needs = Needs(
        context_tokens + summary.max_new_tokens,
        None if memory_gb is None else memory_gb * 1e9,
        concurrency,
        min_acceptance,
    )
    for place, found in sorted(here.items()):
        yield from lines(recommend(place, found, summary.least_documents, needs, sizes), needs, sizes, place)
    yield "Speedups are those of decoding: both prefills are left out, and *end to end* has them in it."
    if concurrency > 1:
        yield (
            f"Memory is that of {concurrency} texts at once. Speeds were taken of prompts decoded alone: "
            "decoded together, verification costs more and speculation gains less."
        )


def read_summary(folder: Path) -> Summary:
    """Raises BadData if the folder is not a report, or one of another version."""
    missing = [name for name in (SUMMARY, CELLS, AGAIN) if not (folder / name).exists()]
    if missing:
        raise BadData(f"{folder} holds no {missing[0]}: name a report folder, such as runs/report-…")
    try:
        return Summary.model_validate_json((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise BadData(
            f"{folder / SUMMARY} was not written by this version ({error.error_count()} fields differ): run "
            "the stage report again"
        ) from None


def context_name(summary: Summary, tokens: int) -> str:
    """The context of the results that stands for so many prompt tokens: the shortest that is not more than a
    tenth below.

    Raises:
        BadData: if there is none.
    """
    enough = {name: length for name, length in summary.contexts.items() if length >= tokens * 0.9}
    if not enough:
        known = ", ".join(f"{name} = {length} tokens" for name, length in summary.contexts.items())
        raise BadData(f"--context {tokens} is beyond the contexts of these results: {known}")
    return min(enough, key=lambda name: enough[name])


def lines(advice: Recommendation, needs: Needs, sizes: dict[str, ModelSize], place: Place) -> Iterator[str]:
    yield f"{place.dataset}, {place.context}:"
    if advice.choice is None:
        yield f"  {advice.why}"
    for what, choice in (("deploy", advice.choice), ("next", advice.runner_up)):
        if choice is not None:
            yield f"  {what:<8}{cell_text(choice)}"
            yield f"  {'':<8}{memory_text(choice, needs, sizes)}"


def cell_text(choice: Choice) -> str:
    mean, low, high = choice.expected
    acceptance = "" if choice.acceptance is None else f", acceptance {100 * choice.acceptance:.1f} %"
    ends = "" if choice.end_to_end is None else f", end to end {choice.end_to_end:.2f}×"
    fresh = "on fresh repeats" if choice.again is not None else "not measured again, so rather less"
    return (
        f"{choice.drafter}, policy {choice.policy}, budget {choice.budget}, γ {choice.gamma}: {mean:.2f}× "
        f"[{low:.2f}, {high:.2f}] {fresh}{ends}; {choice.num_documents} documents{acceptance}"
    )


def memory_text(choice: Choice, needs: Needs, sizes: dict[str, ModelSize]) -> str:
    text = f"KV of a text: drafter {size(needs.drafter_bytes(choice, sizes))}"
    if "target" not in sizes:
        return text
    target = sizes["target"].kv_bytes_per_token * needs.tokens
    total = size(needs.bytes_of(choice, sizes))
    return f"{text}, target {size(target)}; with weights and {needs.concurrency} text(s) {total}"
