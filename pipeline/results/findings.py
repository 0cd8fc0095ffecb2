"""The report's verdicts in plain words, and the summary that carries them.

Every text is derived from figures in the same summary; none is softened or left out for being unwelcome.
Where one γ has to speak for all, it is `Axes.gamma`, which the config fixes before there are results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.axes import Cell, budget_text, family
from pipeline.intervals import Interval
from pipeline.results.axes import Axes, Cells
from pipeline.results.differences import Resampling, control_gaps, family_gains, gains
from pipeline.results.lossy import lossy_findings
from pipeline.results.pool import (
    acceptances,
    lossless,
    nothing_proposed,
    replay_check,
    replayed_or_measured,
    speedups,
)
from pipeline.results.recommend import settings_text
from pipeline.results.scores import Predictions, recommendations, scores, untimed
from pipeline.results.speed import ar_speeds
from pipeline.results.summary import ControlGap, Estimate, FamilyGain, Gain, PredictionScore, Summary
from pipeline.store.rows import CellRow, FailedCell, PromptRow

NO_PREDICTIONS = Predictions()
# Percentile intervals over fewer documents, or fewer training seeds, than this are known to be too narrow.
FEW = 10


def summarise(
    prompt_rows: Sequence[PromptRow],
    cells: Sequence[CellRow],
    failed: Sequence[FailedCell],
    axes: Axes,
    samples: int,
    seed: int,
    predictions: Predictions = NO_PREDICTIONS,
) -> Summary:
    """All of `summary.json` but `stages`, which belong to one run rather than to the results."""
    resampling = Resampling(samples, seed)
    by_cell = replayed_or_measured(prompt_rows)
    summary = Summary(
        lossless=lossless([row for rows in (prompt_rows, *predictions.rechecked) for row in rows]),
        replay_check=replay_check(prompt_rows, predictions.rechecked),
        acceptance=acceptances(cells),
        speedup=speedups(cells),
        compile_s=sum(row.timing.compile_s for row in prompt_rows if row.timing),
        ar_tokens_per_s=ar_speeds(prompt_rows, axes, samples, seed),
        headline=gains(by_cell, axes, resampling),
        families=family_gains(by_cell, axes, resampling),
        controls=control_gaps(by_cell, axes, resampling),
        contexts=axes.contexts,
        max_new_tokens=axes.max_new_tokens,
        least_documents=axes.least_documents,
        models=tuple(predictions.sizes),
        prediction=tuple(scores(prompt_rows, predictions, axes)),
        recommendations=tuple(recommendations(cells, predictions, axes)),
        findings=[],
    )
    texts = [
        *gain_findings(summary.families, axes),
        *gain_findings(_of_single_seeds(summary), axes),
        *recommendation_findings(summary),
        *untimed_findings(untimed(cells, predictions)),
        *speed_findings(summary),
        *exactness_findings(summary),
        *lossy_findings(cells),
        *doubt_findings(by_cell, cells, failed),
        *range_findings(cells, axes),
        *looping_findings(by_cell, axes),
        *control_findings(summary.controls, axes),
    ]
    return summary.model_copy(update={"findings": texts})


def _of_single_seeds(summary: Summary) -> list[Gain]:
    """Gains that no family's gain covers: a family's finding already gives the figure of every seed."""
    covered = {(place_text(gain.cell), gain.cell.drafter, gain.baseline) for gain in summary.families}
    return [
        gain
        for gain in summary.headline
        if (place_text(gain.cell), family(gain.cell.drafter), family(gain.baseline)) not in covered
    ]


def points(difference: Interval) -> str:
    """A difference of shares in percentage points: "+2.1 points [+0.4, +3.9]"."""
    low, high = (f"{100 * bound:+.1f}" for bound in (difference.low, difference.high))
    return f"{100 * difference.mean:+.1f} points [{low}, {high}]"


def place_text(cell: Cell) -> str:
    sampling = f", temperature {cell.temperature:g}, seed {cell.seed}" if cell.temperature > 0 else ""
    return f"{cell.dataset}, {cell.context}, {cell.policy}{sampling}"


def verdict(estimate: Gain, axes: Axes) -> str:
    """What follows a gain in a sentence: " (better)", or why it is not ranked."""
    if few := axes.too_few(estimate.num_documents):
        return f": {few}"
    if estimate.value.low > 0:
        return " (better)"
    return " (worse)" if estimate.value.high < 0 else " (no difference shown)"


def gain_findings(gains: Sequence[Gain], axes: Axes) -> list[str]:
    """One text for each pair of drafters or families in a place: both budgets, and all that `OVER` lists."""
    grouped: dict[tuple[str, str, str], list[Gain]] = defaultdict(list)
    for gain in gains:
        if gain.cell.gamma == axes.gamma:
            grouped[place_text(gain.cell), gain.cell.drafter, gain.baseline].append(gain)
    texts = []
    for (place, drafter, baseline), pair_gains in grouped.items():
        real = [gain for gain in pair_gains if gain.cell.control is None and gain.prompts == "all"]
        parts = [
            f"{points(gain.value)} at {budget_text(gain.cell.budget)}{verdict(gain, axes)}" for gain in real
        ]
        text = f"{place}, γ = {axes.gamma}: {drafter} against {baseline} accepts " + ", ".join(parts)
        text += f", over {max(gain.num_prompts for gain in pair_gains)} prompts"
        text += f" of {max(gain.num_documents for gain in pair_gains)} documents{_seeds_text(real)}."
        small = [gain for gain in pair_gains if gain.cell.budget != "full"]
        for gain in small:
            if gain.prompts == "not_looping":
                text += f" Without looping prompts ({gain.num_prompts} left): {points(gain.value)}."
        real = [gain for gain in real if gain.cell.budget != "full"]
        other = [gain for gain in small if gain.cell.control == "other_prompt"]
        if real and other:
            text += f" With another document's KV in place of the context: {points(other[0].value)}"
            text += _explained(real[0], other[0], axes)
        texts.append(text)
    return texts


def _seeds_text(gains: Sequence[Gain]) -> str:
    """How many training seeds there are, and the gain of each."""
    families = [gain for gain in gains if isinstance(gain, FamilyGain)]
    if not families:
        return ""
    num_seeds = max(gain.num_seeds for gain in families)
    by_seed = [
        f"{', '.join(f'{100 * mean:+.1f}' for mean in gain.by_seed)} at {budget_text(gain.cell.budget)}"
        for gain in families
    ]
    rough = "; intervals that resample so few seeds are rough" if num_seeds < FEW else ""
    return f" and {num_seeds} training seeds (by seed {'; '.join(by_seed)}{rough})"


def _explained(real: Gain, control: Gain, axes: Axes) -> str:
    """The share of a shown gain that is there without the context; over 100 % where the gain grows."""
    if few := axes.too_few(min(real.num_documents, control.num_documents)):
        return f": {few}."
    if real.value.low <= 0:
        return "."
    if control.value.high < 0:
        return ": without the context it is the other way round."
    text = f": {round(100 * control.value.mean / real.value.mean)} % of the gain is there without the context"
    text += " (by an interval that reaches zero)" if control.value.low <= 0 <= control.value.high else ""
    if control.lost is None:
        return f"{text}."
    return f"{text}, {points(control.lost)} of it are not."


def control_findings(controls: Sequence[ControlGap], axes: Axes) -> list[str]:
    """Whether each drafter uses its context, at the smallest budget and at the full cache.

    `no_prefix` counts only for drafters that were trained with B = 0.
    """
    grouped: dict[tuple[str, str, str], list[ControlGap]] = defaultdict(list)
    for gap in controls:
        fair = gap.cell.control != "no_prefix" or gap.cell.drafter in axes.trained_without_prefix
        if gap.cell.gamma == axes.gamma and fair and gap.real_budget in (axes.smallest_budget, "full"):
            grouped[place_text(gap.cell), gap.cell.drafter, str(gap.cell.control)].append(gap)
    texts = []
    for (place, drafter, control), gaps in grouped.items():
        name = "another document's KV" if control == "other_prompt" else "no prefix at all"
        if few := axes.too_few(min(gap.num_documents for gap in gaps)):
            shown_gaps = " and ".join(
                f"{points(gap.value)} at {budget_text(gap.real_budget)}" for gap in gaps
            )
            texts.append(f"{place}, γ = {axes.gamma}: {drafter} accepts {shown_gaps} over {name}: {few}.")
            continue
        unused, used = (
            " and ".join(
                f"{budget_text(gap.real_budget)} ({points(gap.value)} over {name})"
                for gap in gaps
                if (gap.value.low > 0) is shown
            )
            for shown in (False, True)
        )
        text = f"{place}, γ = {axes.gamma}: by {drafter}, the context is "
        if unused:
            text += (
                f"not being used at {unused}, as far as {max(g.num_documents for g in gaps)} documents can "
                "tell"
            )
        text += "; it is " if used and unused else ""
        text += f"used at {used}" if used else ""
        texts.append(f"{text}.")
    return texts


def speed_findings(summary: Summary) -> list[str]:
    """Whether cells at a temperature, for which nothing is recommended, are faster than AR."""
    places: dict[tuple[str, str, float], list[Estimate]] = defaultdict(list)
    for speed in summary.speedup:
        if speed.cell.control is None and speed.cell.temperature > 0:
            places[speed.cell.dataset, speed.cell.context, speed.cell.temperature].append(speed)
    texts = []
    for (dataset, context, temperature), here in places.items():
        if min(speed.num_documents for speed in here) < summary.least_documents:
            continue
        best = max(here, key=lambda speed: speed.value.mean)
        faster = sum(speed.value.low > 1 for speed in here)
        texts.append(
            f"{dataset}, {context}, temperature {temperature:g}: {faster or 'none'} of {len(here)} measured "
            "cells are shown to be faster than autoregressive decoding; the fastest, rather high as it was "
            f"picked from them, is {settings_text(best.cell)} at {best.value.mean:.2f}× "
            f"[{best.value.low:.2f}, {best.value.high:.2f}]."
        )
    return texts


def recommendation_findings(summary: Summary) -> list[str]:
    """What to deploy in each place, and how far predicted times are from measured ones."""
    texts = []
    for advice in summary.recommendations:
        place, choice = f"{advice.dataset}, {advice.context}", advice.choice
        if choice is None:
            texts.append(f"{place}: {advice.why}.")
            continue
        speed = choice.expected
        again = " on fresh repeats" if choice.again is not None else ""
        texts.append(
            f"{place}: deploy {settings_text(choice.cell)}: {speed.mean:.2f}× "
            f"[{speed.low:.2f}, {speed.high:.2f}]{again}, "
            f"{advice.why}."
        )
    scored = {(score.dataset, score.context, score.what): score for score in summary.prediction}
    for (dataset, context, what), score in scored.items():
        if what == "plane by earlier steps":
            texts.append(
                f"Predicted decode times are off by {100 * score.median_error_s:.0f} % in the median of the "
                f"{score.cells} cells of the plane that scores them ({dataset}, {context}), where "
                f"autoregressive steps took {score.pace:.2f} times as long as when the single steps were "
                f"timed that all predictions are made of{by_beside(scored.get((dataset, context, 'plane')))}"
            )
    return texts


def by_beside(score: PredictionScore | None) -> str:
    """The end of a sentence: the formula's own error, apart from changes of the machine's speed."""
    if score is None:
        return "."
    return (
        "; by single steps timed between the plane's prompts, they would be off by "
        f"{100 * score.median_error_s:.0f} %."
    )


def untimed_findings(drafters_by_context: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        f"{context}: no speed is predicted for {', '.join(drafters)}, whose steps could not be timed; the "
        "sweep's log says why."
        for context, drafters in drafters_by_context.items()
    ]


def exactness_findings(summary: Summary) -> list[str]:
    texts = []
    compared, exact = summary.lossless.prompts, summary.lossless.exact
    if compared and exact == compared:
        texts.append(f"All {compared} greedy prompts equal autoregressive decoding token for token.")
    elif compared:
        wrong = compared - exact
        texts.append(
            f"{wrong} of {compared} greedy prompts differ from autoregressive decoding; "
            f"{summary.lossless.explained} "
            "of them where the target's two best logits are closer than its logits' noise. "
            f"The {summary.lossless.left_out_tokens} tokens behind such places count towards no acceptance."
        )
    check = summary.replay_check
    if check.equal < check.rows:
        wrong = check.rows - check.equal
        texts.append(f"Replay and decoding count differently in {wrong} of {check.rows} prompt rows.")
    return texts


def range_findings(cells: Sequence[CellRow], axes: Axes) -> list[str]:
    texts = []
    for context in axes.contexts:
        outside = {
            cell.cell.drafter for cell in cells if cell.cell.context == context and not cell.in_trained_range
        }
        if outside:
            names = ", ".join(name for name in axes.drafters if name in outside)
            texts.append(f"At {context}, outside the positions that they were trained on: {names}.")
    return texts


def looping_findings(cells: Cells, axes: Axes) -> list[str]:
    prompts: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    for key, rows in cells.items():
        if key.temperature == 0:
            for prompt, row in rows.items():
                prompts[key.dataset, key.context][prompt] = row.looping
    shares = [
        f"{dataset} {context} {sum(prompts[dataset, context].values())} of {len(prompts[dataset, context])}"
        for dataset in axes.datasets
        for context in axes.contexts
        if any(prompts[dataset, context].values())
    ]
    if not shares:
        return []
    return [f"Greedy continuations that loop, which makes them easy to draft: {', '.join(shares)}."]


def doubt_findings(cells: Cells, rows: Sequence[CellRow], failed: Sequence[FailedCell]) -> list[str]:
    texts = []
    if failed:
        texts.append(f"{len(failed)} cells or prompts failed and are in no figure; see the list.")
    few = sum(row.num_documents < FEW for row in rows)
    if few:
        texts.append(f"{few} of {len(rows)} cells have fewer than {FEW} documents: intervals are too narrow.")
    empty = sum(nothing_proposed(prompts.values()) for prompts in cells.values())
    if empty:
        texts.append(
            f"{empty} cells are left out, as nothing was proposed in them: every continuation ended at once, "
            "or the draft source found nothing."
        )
    return texts
