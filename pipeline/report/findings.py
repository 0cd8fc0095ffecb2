"""The report's verdicts in plain words, and the summary that carries them.

Every text is derived from figures in the same summary; none is softened or left out for being unwelcome.
Where one γ has to speak for all, it is `Axes.gamma`, which the config fixes before there are results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.report.differences import Cells, Resampling, control_gaps, gains
from pipeline.report.summary import ControlGap, Gain, Summary
from pipeline.report.tables import (
    Axes,
    ar_speeds,
    budget_text,
    estimates,
    lossless,
    replay_check,
    replayed_or_measured,
)
from pipeline.rows import Cell, CellRow, FailedCell, PromptRow

# Percentile intervals over fewer prompts than this are known to be too narrow.
FEW_PROMPTS = 10


def summarise(
    prompt_rows: Sequence[PromptRow],
    cells: Sequence[CellRow],
    failed: Sequence[FailedCell],
    axes: Axes,
    samples: int,
    seed: int,
) -> Summary:
    """All of `summary.json` but `stages`, which belong to one run rather than to the results."""
    resampling = Resampling(samples, seed)
    by_cell = replayed_or_measured(prompt_rows)
    summary = Summary(
        lossless=lossless(prompt_rows),
        replay_check=replay_check(prompt_rows),
        acceptance=estimates(cells, "acceptance"),
        speedup=estimates(cells, "speedup"),
        compile_s=sum(row.compile_s or 0.0 for row in prompt_rows),
        ar_tokens_per_s=ar_speeds(prompt_rows, axes, samples, seed),
        headline=gains(by_cell, axes, resampling),
        controls=control_gaps(by_cell, axes, resampling),
        findings=[],
    )
    texts = [
        *gain_findings(summary.headline, axes),
        *speed_findings(summary, axes),
        *exactness_findings(summary),
        *doubt_findings(by_cell, cells, failed),
        *range_findings(cells, axes),
        *looping_findings(by_cell, axes),
        *control_findings(summary.controls, axes),
    ]
    return summary.model_copy(update={"findings": texts})


def points(estimate: Gain | ControlGap) -> str:
    """A difference of shares in percentage points: "+2.1 points [+0.4, +3.9]"."""
    low, high = (f"{100 * bound:+.1f}" for bound in (estimate.low, estimate.high))
    return f"{100 * estimate.mean:+.1f} points [{low}, {high}]"


def place_text(cell: Cell) -> str:
    sampling = f", temperature {cell.temperature:g}, seed {cell.seed}" if cell.temperature > 0 else ""
    return f"{cell.dataset}, {cell.context}, {cell.policy}{sampling}"


def verdict(estimate: Gain | ControlGap) -> str:
    if estimate.low > 0:
        return "better"
    return "worse" if estimate.high < 0 else "no difference shown"


def gain_findings(headline: Sequence[Gain], axes: Axes) -> list[str]:
    """One text a pair of drafters and place: both budgets, then without looping and under the control."""
    grouped: dict[tuple[str, str, str], list[Gain]] = defaultdict(list)
    for gain in headline:
        if gain.gamma == axes.gamma:
            grouped[place_text(gain), gain.drafter, gain.baseline].append(gain)
    texts = []
    for (place, drafter, baseline), group in grouped.items():
        parts = []
        for gain in group:
            if gain.control is None and gain.prompts == "all":
                parts.append(f"{points(gain)} at {budget_text(gain.budget)} ({verdict(gain)})")
        text = f"{place}, γ = {axes.gamma}: {drafter} against {baseline} accepts " + ", ".join(parts)
        text += f", over {max(gain.num_prompts for gain in group)} prompts."
        small = [gain for gain in group if gain.budget != "full"]
        for gain in small:
            if gain.prompts == "not_looping":
                text += f" Without looping prompts ({gain.num_prompts} left): {points(gain)}."
        real = [gain for gain in small if gain.control is None and gain.prompts == "all"]
        other = [gain for gain in small if gain.control == "other_prompt"]
        if real and other:
            text += f" With another document's KV in place of the context: {points(other[0])}"
            text += _explained(real[0], other[0])
        texts.append(text)
    return texts


def _explained(real: Gain, control: Gain) -> str:
    """How much of a shown gain is there without the context."""
    if real.low <= 0:
        return "."
    if control.low <= 0:
        return ": the gain needs the context."
    share = min(control.mean / real.mean, 1.0)
    return f": {share * 100:.0f} % of the gain is there without the context."


def control_findings(controls: Sequence[ControlGap], axes: Axes) -> list[str]:
    """Whether each drafter uses its context, at the smallest budget and at the full cache.

    `no_prefix` counts only for drafters that were trained with B = 0.
    """
    grouped: dict[tuple[str, str, str], list[ControlGap]] = defaultdict(list)
    for gap in controls:
        fair = gap.control != "no_prefix" or gap.drafter in axes.trained_without_prefix
        if gap.gamma == axes.gamma and fair and gap.real_budget in (axes.smallest_budget, "full"):
            grouped[place_text(gap), gap.drafter, str(gap.control)].append(gap)
    texts = []
    for (place, drafter, control), gaps in grouped.items():
        name = "another document's KV" if control == "other_prompt" else "no prefix at all"
        unused, used = (
            " and ".join(
                f"{budget_text(gap.real_budget)} ({points(gap)} over {name})"
                for gap in gaps
                if (gap.low > 0) is shown
            )
            for shown in (False, True)
        )
        text = f"{place}, γ = {axes.gamma}: by {drafter}, the context is "
        if unused:
            text += (
                f"not being used at {unused}, as far as {max(g.num_prompts for g in gaps)} prompts can tell"
            )
        text += "; it is " if used and unused else ""
        text += f"used at {used}" if used else ""
        texts.append(f"{text}.")
    return texts


def speed_findings(summary: Summary, axes: Axes) -> list[str]:
    """The fastest measured cell of each place, or that none is faster than AR."""
    texts = []
    for dataset in axes.datasets:
        for context in axes.contexts:
            here = [
                s for s in summary.speedup if (s.dataset, s.context, s.control) == (dataset, context, None)
            ]
            if not here:
                continue
            best = max(here, key=lambda s: s.mean)
            stops = f" stopping under {best.threshold:g}" if best.threshold else ""
            what = (
                f"{best.drafter}, {best.policy}, {budget_text(best.budget)}, γ = {best.gamma}{stops} at "
                f"{best.mean:.2f}× [{best.low:.2f}, {best.high:.2f}] of autoregressive decode speed"
            )
            if best.low > 1:
                texts.append(f"{dataset}, {context}: the fastest of {len(here)} measured cells is {what}.")
            else:
                texts.append(
                    f"{dataset}, {context}: no measured cell is shown to be faster than autoregressive "
                    f"decoding on this machine; the best is {what}."
                )
    return texts


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
            "of them where the target's two best logits are closer than its logits' noise."
        )
    check = summary.replay_check
    if check.equal < check.rows:
        wrong = check.rows - check.equal
        texts.append(f"Replay and decoding count differently in {wrong} of {check.rows} prompt rows.")
    return texts


def range_findings(cells: Sequence[CellRow], axes: Axes) -> list[str]:
    texts = []
    for context in axes.contexts:
        outside = {cell.drafter for cell in cells if cell.context == context and not cell.in_trained_range}
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
    few = sum(row.num_prompts < FEW_PROMPTS for row in rows)
    if few:
        texts.append(
            f"{few} of {len(rows)} cells have fewer than {FEW_PROMPTS} prompts: intervals are too narrow."
        )
    empty = sum(not any(row.num_proposed for row in prompts.values()) for prompts in cells.values())
    if empty:
        texts.append(f"{empty} cells are left out: every continuation ended before a token was proposed.")
    return texts
