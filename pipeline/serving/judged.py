"""Whether a server keeps the promise of replay: its texts, its acceptance, its speed, with intervals.

Acceptance here is acceptances ÷ (γ × rounds) on both sides. An engine drafts γ in a round at the end of a
text too, where a report counts the proposals that are left; and an engine counts what it accepts beyond the
end, so that it may have a little more than replay, and never less for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.gate.bounds import Verdict
from pipeline.intervals import Interval, bootstrap_interval, paired_difference
from pipeline.serving.served import ServedPrompt
from pipeline.store.rows import Row

SAMPLES, SEED = 2000, 42
TIE = 0.1  # logits: texts that part at a smaller gap part by rounding, as another precision or batch does
NAMED = 5  # prompts that a reason names, at most


class Position(Row):
    """Acceptances at one draft position ÷ rounds, as served and as replayed."""

    position: int
    served: Interval
    replayed: Interval


class ServerCheck(Row):
    """`check.json`: the verdict, why, and the figures behind it; intervals are 95 % over documents."""

    verdict: Verdict
    reasons: list[str]
    url: str
    plain_url: str | None
    model: str
    drafter: str
    view: str
    gamma: int
    margin: float
    served: Interval | None
    replayed: Interval | None
    difference: Interval | None
    by_position: list[Position]
    tokens_per_s: float | None
    plain_tokens_per_s: float | None
    speedup: Interval | None
    prompts: list[ServedPrompt]


def comparable(prompts: Sequence[ServedPrompt]) -> list[ServedPrompt]:
    """Those whose rounds are known, and are of the target's text or of one that parts from it by a tie."""
    return [p for p in prompts if p.rounds and (p.parts_at is None or is_tie(p))]


def is_tie(prompt: ServedPrompt) -> bool:
    return prompt.parts_at is not None and prompt.gap is not None and prompt.gap < TIE


def judge(
    prompts: Sequence[ServedPrompt], gamma: int, margin: float, least_documents: int
) -> tuple[Verdict, list[str]]:
    """Fail where a text is not the target's or less is accepted than `margin` tolerates; pass where the
    interval shows neither, and every prompt has an answer; and the reasons in words."""
    reasons = [*text_reasons(prompts), *silence_reasons(prompts)]
    counted = comparable(prompts)
    documents = len({prompt.document_id for prompt in counted})
    wrong = any(p.gap is not None and p.gap >= TIE for p in prompts)
    rounds, proposed = sum(p.rounds for p in counted), sum(p.proposed for p in counted)
    if counted and not (gamma - 1) * rounds < proposed <= gamma * rounds:
        found = f"{proposed / rounds:.2f}"
        said = f"the server drafts {found} tokens a round, and {gamma} were promised: see --gamma"
        return "fail" if wrong else "not_enough_evidence", [said, *reasons]
    if documents < least_documents:
        said = f"acceptance is known of {documents} documents, and {least_documents} are the least"
        return "fail" if wrong else "not_enough_evidence", [said, *reasons]
    difference = difference_of(counted, gamma)
    said = (
        f"served − replayed acceptance is {100 * difference.mean:+.1f} points "
        f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] over {documents} documents; "
        f"{100 * margin:g} points less are tolerated"
    )
    if wrong or difference.high < -margin:
        return "fail", [said, *reasons]
    parted = any(p.parts_at is not None and not is_tie(p) for p in prompts)
    unsure = difference.low < -margin or parted or any(p.failed for p in prompts)
    return "not_enough_evidence" if unsure else "pass", [said, *reasons]


def text_reasons(prompts: Sequence[ServedPrompt]) -> list[str]:
    answered = [prompt for prompt in prompts if not prompt.failed]
    if not answered:
        return []
    parted = [prompt for prompt in answered if prompt.parts_at is not None]
    ties = sum(is_tie(prompt) for prompt in parted)
    said = [f"{len(answered) - len(parted)} of {len(answered)} texts are the target's own, token for token"]
    if ties:
        said.append(f"{ties} part from it where its two best logits are less than {TIE:g} apart: rounding")
    lines = []
    for prompt in parted:
        if not is_tie(prompt):
            gap = "" if prompt.gap is None else f", where its two best logits are {prompt.gap:.2g} apart"
            lines.append(f"{prompt.prompt_id} parts from it at token {prompt.parts_at}{gap}")
    said += shortened(lines)
    both = [prompt for prompt in answered if prompt.plain_clock]
    if both:
        equal = sum(prompt.parts_from_plain_at is None for prompt in both)
        said.append(f"{equal} of {len(both)} texts are those of the server without speculation")
    return said


def silence_reasons(prompts: Sequence[ServedPrompt]) -> list[str]:
    """Of prompts without an answer, or whose rounds are not known."""
    said = shortened([f"{p.prompt_id} has no answer: {p.failed}" for p in prompts if p.failed])
    plain = [f"{p.prompt_id}, without speculation: {p.plain_failed}" for p in prompts if p.plain_failed]
    said += shortened(plain)
    notes = [p.note or "the server drafted nothing" for p in prompts if not (p.failed or p.rounds)]
    for note in dict.fromkeys(notes):
        count = notes.count(note)
        said.append(f"{count} of {len(prompts)} prompts tell nothing of drafts: {note}")
    return said


def shortened(lines: Sequence[str]) -> list[str]:
    more = [f"and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    return [*lines[:NAMED], *more]


# ── figures ───────────────────────────────────────────────────────────────────────────────────────


def difference_of(counted: Sequence[ServedPrompt], gamma: int) -> Interval:
    """Served − replayed acceptance, paired by prompt."""
    return paired_difference(
        ([sum(p.accepted_at) for p in counted], [gamma * p.rounds for p in counted]),
        ([sum(p.replayed_at) for p in counted], [gamma * p.replayed_rounds for p in counted]),
        samples=SAMPLES,
        seed=SEED,
        clusters=[p.document_id for p in counted],
    )


def share(prompts: Sequence[ServedPrompt], of: Callable[[ServedPrompt], tuple[float, float]]) -> Interval:
    """A pooled ratio over prompts, its interval over documents."""
    above, below = zip(*(of(prompt) for prompt in prompts), strict=True)
    documents = [prompt.document_id for prompt in prompts]
    return bootstrap_interval(above, below, samples=SAMPLES, seed=SEED, clusters=documents)


def by_position(counted: Sequence[ServedPrompt], gamma: int) -> list[Position]:
    def at(position: int) -> Position:
        def kept(values: Sequence[float]) -> float:
            return values[position] if position < len(values) else 0

        return Position(
            position=position + 1,
            served=share(counted, lambda p: (kept(p.accepted_at), p.rounds)),
            replayed=share(counted, lambda p: (kept(p.replayed_at), p.replayed_rounds)),
        )

    return [at(position) for position in range(gamma if counted else 0)]


def speeds(prompts: Sequence[ServedPrompt]) -> tuple[float | None, float | None, Interval | None]:
    """Tokens/s behind the first tokens with and without speculation, pooled, and their ratio.

    With both servers, over the prompts that both answered.
    """
    timed = [(p, p.clock, p.plain_clock) for p in prompts if p.clock and p.clock.decoded and p.clock.decode_s]
    both = [(p, ours, plain) for p, ours, plain in timed if plain and plain.decoded and plain.decode_s]
    if not timed:
        return None, None, None
    if not both:
        return sum(c.decoded for _, c, _ in timed) / sum(c.decode_s for _, c, _ in timed), None, None
    with_it = sum(c.decoded for _, c, _ in both) / sum(c.decode_s for _, c, _ in both)
    without = sum(c.decoded for _, _, c in both) / sum(c.decode_s for _, _, c in both)
    # Where both wrote as many tokens, the plain server's seconds ÷ ours; else its pace over as many.
    seconds = {
        p.prompt_id: (plain.decode_s / plain.decoded * ours.decoded, ours.decode_s) for p, ours, plain in both
    }
    return with_it, without, share([p for p, _, _ in both], lambda p: seconds[p.prompt_id])
