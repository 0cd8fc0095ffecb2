"""The report in three answers: is it worth it here, with what, and why believe it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.axes import MODEL_FREE, Place, extras_text
from pipeline.intervals import Interval
from pipeline.results.recommend import Choice, Recommendation
from pipeline.results.summary import Summary
from pipeline.store.rows import CellRow


class Answer(NamedTuple):
    question: str
    text: str


def answers(summary: Summary, cells: Sequence[CellRow]) -> list[Answer]:
    """In plain words; the tables of the report have the figures."""
    return [
        Answer("Is it worth it here?", worth(summary)),
        Answer("With what?", with_what(summary.recommendations)),
        Answer("Why believe it?", why(summary, cells)),
    ]


def worth(summary: Summary) -> str:
    if not summary.recommendations:
        return "Nothing was timed, so this says how often proposals are accepted and not what that is worth."
    yes, no, unknown = [], [], []
    for advice in summary.recommendations:
        if advice.choice:
            yes.append(f"{where(advice)} ({times(advice.choice.expected)})")
        elif advice.why.startswith("do not speculate"):
            best = f" (the best is {times(advice.runner_up.expected)})" if advice.runner_up else ""
            no.append(f"{where(advice)}{best}")
        else:
            unknown.append(f"{where(advice)} ({advice.why.partition(':')[0].partition(' (')[0]})")
    said = []
    if yes:
        said.append(f"Yes for {', '.join(yes)}: so many times as fast as autoregressive decoding.")
    if no:
        said.append(f"{'Not' if yes else 'No, not'} for {', '.join(no)}.")
    if unknown:
        said.append(f"Not known for {', '.join(unknown)}.")
    return " ".join(said)


def with_what(advised: Sequence[Recommendation]) -> str:
    """The recommended settings, places with the same ones together."""
    by_settings: dict[str, list[str]] = {}
    for advice in advised:
        if advice.choice:
            by_settings.setdefault(source_text(advice.choice), []).append(where(advice))
    if by_settings:
        return ". ".join(f"{text}: {', '.join(places)}" for text, places in by_settings.items()) + "."
    known = any(advice.why.startswith("do not speculate") for advice in advised)
    return "With none of what was timed." if known else "That is not known."


def source_text(choice: Choice) -> str:
    cell = choice.cell
    stops = f", stopping under {cell.threshold:g}" if cell.threshold else ""
    if cell.drafter in MODEL_FREE:
        return f"{cell.drafter.replace('_', ' ').capitalize()}, {cell.gamma} tokens a round{stops}"
    kept = f"the full cache, {cell.gamma}" if cell.budget == "full" else (
        f"{cell.budget} prefix entries ({cell.policy}{extras_text(cell.view)}), {cell.gamma}"
    )  # fmt: skip
    return f"The drafter {cell.drafter} behind {kept} tokens a round{stops}"


def why(summary: Summary, cells: Sequence[CellRow]) -> str:
    exact, replay = summary.lossless, summary.replay_check
    said = []
    if exact.prompts:
        near = f", {exact.explained} more up to a tie of the target's logits" if exact.explained else ""
        said.append(
            f"{exact.exact} of {exact.prompts} measured texts are the target's own, token for token{near}."
        )
    if replay.rows:
        said.append(f"Replay counted as decoding did in {replay.equal} of {replay.rows} rows.")
    timed = [advice.choice or advice.runner_up for advice in summary.recommendations]
    documents = [choice.num_documents for choice in timed if choice]
    if documents:
        again = sum(choice.again is not None for choice in timed if choice)
        fresh = "on fresh repeats" if again == len(documents) else "measured once, so the best rather high"
        said.append(f"Speeds are over at least {min(documents)} documents a place, {fresh}.")
    texts: dict[Place, tuple[int, int]] = {}  # of the cell with the most prompts, how many there are and loop
    for row in cells:
        if row.cell.temperature == 0 and row.cell.control is None and not row.cell.lossy:
            here = row.num_prompts, row.num_looping
            texts[row.cell.place] = max(texts.get(row.cell.place, (0, 0)), here)
    prompts, looping = sum(count for count, _ in texts.values()), sum(loops for _, loops in texts.values())
    if prompts:
        flattery = ", which flatters every drafter" if looping else ""
        said.append(f"Of {prompts} greedy texts {looping} loop{flattery}.")
    return " ".join(said) or "There are no rows yet."


def where(advice: Recommendation) -> str:
    return f"{advice.dataset} at {advice.context}"


def times(speed: Interval) -> str:
    return f"{speed.mean:.2f}× [{speed.low:.2f}, {speed.high:.2f}]"
