"""README's sentences of results, and the table of docs/findings.md, against the summaries of the studies."""

from __future__ import annotations

import re
from dataclasses import astuple

from pipeline.results.recommend import Choice
from pipeline.results.summary import FamilyGain, Summary, read_summary
from tests.helpers.paths import ROOT

HEAD = (
    "data", "context", "greedy", "greedy, 800 steps", "explained", "T = 1 (estimate)",
    "T = 1, KL (estimate)", "deploy (greedy)", "decode speedup", "end to end",
)  # fmt: skip


def in_points(gain: FamilyGain) -> str:
    mean, low, high = (100 * part for part in astuple(gain.value))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def deployed(choice: Choice | None) -> tuple[str, str, str]:
    """The cell in words, and its speed on fresh repeats without and with both prefills."""
    if choice is None:
        return "do not speculate", "", ""
    cell, again = choice.cell, choice.again
    parts = [f"`{cell.drafter}`"]
    if cell.drafter == "self_speculation":
        parts.append(f"`{cell.policy}`")
    if cell.drafter != "prompt_lookup":
        parts.append(f"B = {cell.budget}")
    parts.append(f"γ = {cell.gamma}")
    if cell.threshold:
        parts.append(f"stopping under {cell.threshold:g}")
    assert again is not None and choice.end_to_end is not None
    return (
        ", ".join(parts),
        f"{again.mean:.2f} [{again.low:.2f}, {again.high:.2f}]",
        f"{choice.end_to_end:.2f}",
    )


def at_64(summary: Summary) -> dict[tuple[object, ...], FamilyGain]:
    """Gains at B = 64 and γ = 4 over all prompts."""
    return {
        (gain.cell.drafter, *gain.cell.place, gain.cell.temperature, gain.cell.control): gain
        for gain in summary.families
        if (gain.cell.budget, gain.cell.gamma, gain.prompts) == (64, 4, "all")
    }


def table(summary: Summary, longer: Summary) -> str:
    """Of both studies: `longer` is of the target that was pretrained for 800 steps."""
    gains, gains_longer = at_64(summary), at_64(longer)
    rows = []
    for place in summary.recommendations:
        where = place.dataset, place.context
        greedy, sampled = (gains["multi_view", *where, temperature, None] for temperature in (0.0, 1.0))
        trained = gains_longer["multi_view", *where, 0.0, None]
        other = gains_longer["multi_view", *where, 0.0, "other_prompt"]
        assert trained.value.low > 0, "no gain, so no share of one"
        share = f"{100 * other.value.mean / trained.value.mean:.0f} %"
        kl = gains["kl", *where, 1.0, None]
        told = (in_points(greedy), in_points(trained), share, in_points(sampled), in_points(kl))
        rows.append((where[0].removesuffix("-sample"), where[1], *told, *deployed(place.choice)))
    head, *body = (f"| {' | '.join(cells)} |" for cells in (HEAD, *rows))
    return "\n".join([head, "|---" * len(HEAD) + "|", *body])


def summary_of(study: str) -> Summary:
    return read_summary(ROOT / "docs/results" / study / "summary.json")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def span(values: list[float], form: str) -> str:
    """The least and the most of some values."""
    return f"{min(values):{form}} to {max(values):{form}}".replace("-", "−")


def clear(gains: list[FamilyGain]) -> int:
    """In how many places the interval leaves out 0."""
    return sum(gain.value.low > 0 or gain.value.high < 0 for gain in gains)


def sentences(summary: Summary, longer: Summary) -> list[str]:
    """The figures of README's five sentences, as they stand there."""
    gains, gains_longer = at_64(summary), at_64(longer)
    places = [(place.dataset, place.context) for place in summary.recommendations]
    assert len(places) == len({dataset for dataset, _ in places}) * len({name for _, name in places}) == 9

    def of(found: dict[tuple[object, ...], FamilyGain], *axes: object) -> list[FamilyGain]:
        drafter, temperature, control = axes
        return [found[drafter, *where, temperature, control] for where in places]

    greedy, before = of(gains, "multi_view", 0.0, None), of(gains_longer, "multi_view", 0.0, None)
    other = of(gains_longer, "multi_view", 0.0, "other_prompt")
    sampled, kl = of(gains, "multi_view", 1.0, None), of(gains, "kl", 1.0, None)
    assert clear(greedy) == 0 and clear(before) == 9
    assert {gain.num_seeds for gain in (*greedy, *before, *sampled, *kl)} == {3}
    shares = [100 * o.value.mean / b.value.mean for o, b in zip(other, before, strict=True)]
    points = [[100 * gain.value.mean for gain in found] for found in (greedy, before, sampled, kl)]
    choices = [place.choice for place in summary.recommendations if place.choice]
    again = [choice.again.mean for choice in choices if choice.again]
    whole = [choice.end_to_end for choice in choices if choice.end_to_end is not None]
    lossless, replayed = summary.lossless, summary.replay_check
    assert lossless.exact == lossless.prompts and len(again) == len(whole) == 9
    return [
        f"is {span(points[0], '+.1f')} points and clear in no place",
        f"it was {span(points[1], '+.1f')} points and clear in all",
        f"Of that gain {span(shares, '.0f')} % is there with another document's KV too",
        f"the difference is {span(points[2], '+.1f')} points when trained with cross entropy",
        f"and {span(points[3], '+.1f')} points when trained with KL",
        f"decodes {span(again, '.2f')} times as fast",
        f"and {span(whole, '.2f')} times with both prefills",
        f"All {lossless.exact} measured prompts equal autoregressive decoding",
        f"in {replayed.equal} of {replayed.rows} rows",
    ]


def test_findings_show_the_committed_studies() -> None:
    expected = table(summary_of("paper-small"), summary_of("paper-small-800"))
    assert expected in text_of("docs/findings.md"), f"the table is not that of the study:\n{expected}"


def test_the_sentences_of_readme_are_those_of_the_committed_studies() -> None:
    section = text_of("README.md").split("## Results")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d\. ", section, re.MULTILINE)) == 5
    shown = " ".join(section.split())
    for part in sentences(summary_of("paper-small"), summary_of("paper-small-800")):
        assert part in shown, f"README does not say: {part}"


def real_sentences(summary: Summary) -> list[str]:
    """The figures of README's sentences on the real target."""
    at_four = {
        (e.cell.drafter, e.cell.place): 100 * e.value.mean
        for e in summary.acceptance
        if not e.cell.control and (e.cell.budget in (0, 64) or e.cell.drafter == "prompt_lookup")
    }
    ranges = {
        name: span([value for (drafter, _), value in at_four.items() if drafter == name], ".1f")
        for name in ("multi_view", "untrained", "prompt_lookup")
    }
    gains = [
        gain
        for gain in summary.headline
        if (gain.cell.drafter, gain.baseline, gain.cell.budget) == ("multi_view", "full_only", 64)
        and (gain.cell.control, gain.prompts, gain.cell.temperature) == (None, "all", 0.0)
    ]
    shown = [
        check.note.split(" texts ")[0].split(" of ") for check in summary.checks if "looping" in check.row
    ]
    loops, texts = (sum(int(pair[at]) for pair in shown) for at in (0, 1))
    difference = span([100 * gain.value.mean for gain in gains], "+.1f")
    unclear = [gain for gain in gains if gain.value.low <= 0 <= gain.value.high]
    assert all(gain.value.high < 0 for gain in gains if gain not in unclear)
    return [
        f"`multi_view` has {ranges['multi_view']} % of its proposals accepted",
        f"untrained layers have {ranges['untrained']} %",
        f"for nothing, {ranges['prompt_lookup']} %",
        f"is {difference} points, clear in {len(gains) - len(unclear)} of {len(gains)} places",
        f"Of the {texts} texts {loops} loop",
    ]


def test_the_sentences_of_readme_on_the_real_target_are_its_studys() -> None:
    shown = " ".join(text_of("README.md").split("## Results")[1].split("**On toy models**")[0].split())
    for part in real_sentences(summary_of("smollm2")):
        assert part in shown, f"README does not say: {part}"
