"""`budgetdraft recommend`: from finished results to what a deployment should use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.axes import MODEL_FREE, Place
from pipeline.errors import BadData
from pipeline.results.lossy import departure_text
from pipeline.results.recommend import (
    Choice,
    Needs,
    Recommendation,
    Sizes,
    choices,
    models_of,
    recommend,
    settings_text,
)
from pipeline.results.summary import Summary, read_summary
from pipeline.serving.flags import NAMES, Engine, lacks, of_cell
from pipeline.store.files import read_rows
from pipeline.store.layout import AGAIN, CELLS, RUN_OFF, SUMMARY
from pipeline.store.rows import CellRow
from pipeline.units import binary_size, gigabytes


def advise(
    results: Path,
    context_tokens: int,
    dataset: str | None,
    memory_gb: float | None,
    concurrency: int,
    min_acceptance: float | None,
    engine: Engine | None = None,
    lossy: bool = False,
) -> Iterator[str]:
    """Lines of text: for every data set what to deploy at a context, or why not to speculate.

    Args:
        results: `summary.json`, or the report folder that holds it.
        engine: take cells alone that this engine can serve, and give its flags.
        lossy: take the cells of a lossy rule alone, whose text is not the target's, not the exact ones.

    Raises:
        BadData: if the results lack what is asked: the context, the data set, speeds, sizes.
    """
    folder = results.parent if results.is_file() else results
    summary = summary_of(folder)
    context = context_name(summary, context_tokens)
    sizes = {model.name: model for model in summary.models}
    cells = [row for row in read_rows(folder / CELLS, CellRow) if row.cell.lossy == lossy]
    if lossy and not cells:
        raise BadData(f"{folder} has no cell of a lossy rule: add dropmatch to sweep.rules and run it again")
    ranked = choices(cells, read_rows(folder / RUN_OFF, CellRow), read_rows(folder / AGAIN, CellRow), lossy)
    here = {
        place: ranking
        for place, ranking in ranked.items()
        if place.context == context and dataset in (None, place.dataset)
    }
    if not here:
        raise BadData(f"{folder} has no measured speed at {context}{why_none(cells, context, dataset)}")
    needs = Needs(
        context_tokens,
        summary.max_new_tokens,
        None if memory_gb is None else memory_gb * 1e9,
        concurrency,
        min_acceptance,
    )
    length = summary.contexts[context]
    if length != context_tokens:
        yield f"{context} ({length} tokens) stands for a context of {context_tokens} tokens."
    swept = {
        cell.cell.dataset
        for cell in cells
        if cell.cell.context == context and dataset in (None, cell.cell.dataset)
    }
    for place in (Place(name, context) for name in sorted(swept)):
        ranking = here.get(place, [])
        able = servable(engine, ranking)
        if engine and ranking and not able:
            yield f"{place.dataset}, {place.context}:"
            yield f"  nothing that was measured can be served by {NAMES[engine]}"
            yield from engine_lines(engine, None, ranking)
            continue
        advice = recommend(place, able, summary.least_documents, needs, sizes)
        yield from lines(advice, needs, sizes, place)
        if engine:
            yield from engine_lines(engine, advice.choice, ranking)
            if advice.choice:
                yield from context_lines(advice.choice, place, ranked, summary, needs, sizes)
    yield "This is for greedy decoding."
    if engine:
        yield (
            f"Speedups are of this project's engine: {NAMES[engine]}'s steps cost otherwise. What it accepts "
            "of a trained drafter's tokens `budgetdraft check-server` tells."
        )
    yield "Speedups are those of decoding: both prefills are left out, and *end to end* has them in it."
    yield "Memory is that of weights and KV: working memory (activations, logits) is not in it."
    if concurrency > 1:
        yield f"It is that of {concurrency} texts at once."
    together = max(choice.prompts_together for ranking in here.values() for choice in ranking)
    if together > 1:
        yield f"Speeds were taken of up to {together} prompts decoded together."
    elif concurrency > 1:
        yield (
            "Speeds were taken of prompts decoded alone: decoded together, verification costs more and "
            "speculation gains less."
        )


def servable(engine: Engine | None, ranking: Sequence[Choice]) -> list[Choice]:
    return [choice for choice in ranking if engine is None or not lacks(engine, choice.cell)]


def engine_lines(engine: Engine, chosen: Choice | None, ranking: Sequence[Choice]) -> Iterator[str]:
    """The engine's flags for what is recommended, and what was left out for it."""
    reasons = [why for choice in ranking if (why := lacks(engine, choice.cell))]
    for why in dict.fromkeys(reasons):
        yield f"  {'out':<8}{reasons.count(why)} measured cells: {why}"
    if chosen is None:
        return
    cell = chosen.cell
    yield f"  {'flags':<8}{of_cell(engine, cell, 'EXPORTED')}"
    if cell.drafter not in MODEL_FREE:
        window = "" if cell.budget == "full" else f" --window {cell.budget} --sinks {cell.view.sinks or 0}"
        target = " --target TARGET" if cell.kind == "head" else ""
        command = f"budgetdraft export DRAFTER EXPORTED --for {engine}{window}{target}"
        yield f"  {'':<8}EXPORTED is made by: {command}"


def context_lines(
    chosen: Choice,
    place: Place,
    ranked: Mapping[Place, Sequence[Choice]],
    summary: Summary,
    needs: Needs,
    sizes: Sizes,
) -> Iterator[str]:
    """At which measured contexts the recommended drafter, behind its view, should draft, and how much.

    A server has one drafter and one view; γ can be changed, and speculation turned off.
    """
    said = []
    for name, tokens in summary.contexts.items():
        here = [
            choice for choice in ranked.get(Place(place.dataset, name), []) if same_server(choice, chosen)
        ]
        at = replace(needs, prompt_tokens=tokens)
        advice = recommend(Place(place.dataset, name), here, summary.least_documents, at, sizes)
        if advice.choice:
            said.append(f"{name}: γ = {advice.choice.cell.gamma}")
        else:
            known = here and advice.runner_up and advice.why.startswith("do not speculate")
            said.append(f"{name}: {'off' if known else 'not known'}")
    if len(said) > 1:
        yield f"  {'by':<8}context, measured: {'; '.join(said)}"
    together = sorted({choice.prompts_together for choice in ranked.get(place, [])})
    measured = ", ".join(map(str, together))
    yield (
        f"  {'':<8}batch size: measured at {measured} alone, so no schedule of γ; a study with other "
        "sweep.measure.prompts_together tells when to turn it off"
    )


def same_server(choice: Choice, chosen: Choice) -> bool:
    one, two = choice.cell, chosen.cell
    return (one.drafter, one.view.kept, one.threshold) == (two.drafter, two.view.kept, two.threshold)


def why_none(cells: Sequence[CellRow], context: str, dataset: str | None) -> str:
    """What the results have in place of greedy speeds at a context, or what to do."""
    timed = [cell for cell in cells if cell.mode == "measure" and cell.cell.context == context]
    sampled = sorted({cell.cell.temperature for cell in timed if dataset in (None, cell.cell.dataset)})
    if sampled:
        temperatures = ", ".join(f"{temperature:g}" for temperature in sampled)
        return (
            f" that is greedy, only at temperature {temperatures}: add 0.0 to sweep.temperatures and to "
            "sweep.measure.temperatures, and run it again"
        )
    if dataset and timed:
        known = ", ".join(sorted({cell.cell.dataset for cell in timed}))
        return f" for data set {dataset!r}; there is {known}"
    return ": set sweep.mode to both or measure, and run it again"


def summary_of(folder: Path) -> Summary:
    """A report folder's summary. Raises BadData if the report is missing, cut off or of another version."""
    missing = [name for name in (SUMMARY, CELLS, RUN_OFF, AGAIN) if not (folder / name).exists()]
    if missing:
        raise BadData(f"{folder} holds no {missing[0]}: name a report folder, such as runs/report-…")
    return read_summary(folder / SUMMARY)


def context_name(summary: Summary, tokens: int) -> str:
    """The context of the results that stands for `tokens` prompt tokens: the shortest one that is at most a
    tenth shorter.

    Raises:
        BadData: if there is none.
    """
    enough = {name: length for name, length in summary.contexts.items() if length >= tokens * 0.9}
    if not enough:
        known = ", ".join(f"{name} = {length} tokens" for name, length in summary.contexts.items())
        raise BadData(f"--context {tokens} is beyond the contexts of these results: {known}")
    return min(enough, key=lambda name: enough[name])


def lines(advice: Recommendation, needs: Needs, sizes: Sizes, place: Place) -> Iterator[str]:
    yield f"{place.dataset}, {place.context}:"
    if advice.choice is None:
        yield f"  {advice.why}"
    else:
        yield from cell_lines("deploy", advice.choice, needs, sizes)
        yield f"  {'':<8}{advice.why}"
    if advice.runner_up is not None:
        yield from cell_lines("next" if advice.choice else "best", advice.runner_up, needs, sizes)


def cell_lines(what: str, choice: Choice, needs: Needs, sizes: Sizes) -> Iterator[str]:
    yield f"  {what:<8}{cell_text(choice)}"
    if choice.departure:
        yield f"  {'':<8}{departure_text(choice.departure)}"
    yield f"  {'':<8}{memory_text(choice, needs, sizes)}"


def cell_text(choice: Choice) -> str:
    speed = choice.expected
    how = "by replay" if choice.acceptance_mode == "replay" else "measured"
    acceptance = "" if choice.acceptance is None else f", acceptance {100 * choice.acceptance:.1f} % {how}"
    ends = "" if choice.end_to_end is None else f", end to end {choice.end_to_end:.2f}×"
    fresh = "on fresh repeats" if choice.again is not None else "not measured again, so rather less"
    differ = f"; {choice.num_inexact} prompt(s) are not what AR gives" if choice.num_inexact else ""
    return (
        f"{settings_text(choice.cell)}: {speed.mean:.2f}× [{speed.low:.2f}, {speed.high:.2f}] {fresh}{ends}; "
        f"{choice.num_documents} documents timed{acceptance}{differ}"
    )


def memory_text(choice: Choice, needs: Needs, sizes: Sizes) -> str:
    unknown = [name for name in models_of(choice.cell) if name not in sizes]
    if unknown:
        return (
            f"KV of a text: drafter {binary_size(choice.drafter_kv_bytes)} of the prefix; the rest is not "
            f"known, as these results lack the size of {' and '.join(unknown)}"
        )
    drafter, target = binary_size(needs.drafter_bytes(choice, sizes)), binary_size(needs.target_bytes(sizes))
    total = f"with weights and {needs.concurrency} text(s) {gigabytes(needs.bytes_of(choice, sizes))}"
    return f"KV of a text: drafter {drafter}, target {target}; {total}"
