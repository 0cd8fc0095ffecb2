"""What a server did with a run's evaluation prompts, beside what replay promised of the same prompts.

The two count a little differently: a server's last round drafts γ whatever is left of the text, and it counts
what it accepts beyond the end. Over a hundred rounds that is a fraction of a point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.errors import BadData, Incomplete
from pipeline.gate.bounds import Verdict
from pipeline.intervals import Interval, bootstrap_interval, paired_difference
from pipeline.serving.client import Drafted, Reply, Scrape, Server, between
from pipeline.store.rows import Continuation, Prompt, PromptRow, Row

SAMPLES, SEED = 2000, 42


class ServedPrompt(Row):
    """One prompt: what the server drafted and how long it took, and where its text parts from the target's.

    `gap` is the difference of the target's two best logits where the texts part: a small one is rounding.
    `told_by` says whether the counts came with the answer or from the metrics page; "" where there are none,
    and `note` says why. `failed` holds the error of a prompt that has no answer.
    """

    prompt_id: str
    document_id: str
    dataset: str
    context: str
    num_tokens: int = 0
    first_s: float = 0.0
    seconds_a_token: float | None = None
    plain_seconds_a_token: float | None = None
    parts_at: int | None = None
    gap: float | None = None
    parts_from_plain_at: int | None = None
    rounds: int = 0
    proposed: int = 0
    accepted_at: tuple[int, ...] = ()
    replayed_rounds: float
    replayed_proposed: float
    replayed_accepted: float
    replayed_at: tuple[float, ...]
    told_by: str = ""
    note: str = ""
    failed: str = ""

    @property
    def accepted(self) -> int:
        return sum(self.accepted_at)


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


@dataclass(frozen=True)
class Promise:
    """A prompt with the target's own greedy text, and its replayed row of the cell that is served."""

    prompt: Prompt
    text: Continuation
    row: PromptRow


def ask_one(promise: Promise, server: Server, plain: Server | None, gamma: int) -> ServedPrompt:
    """Send a prompt to the server, and to the one without speculation.

    Raises:
        BadData: if the server drafts more tokens a round than were promised.
    """
    prompt, counts = promise.prompt, promise.row.counts
    assert counts.num_proposed is not None, "promises are replayed rows of known proposals"
    told = ServedPrompt(
        prompt_id=prompt.prompt_id,
        document_id=prompt.document_id,
        dataset=prompt.dataset,
        context=prompt.context,
        replayed_rounds=counts.num_rounds,
        replayed_proposed=counts.num_proposed,
        replayed_accepted=counts.num_accepted,
        replayed_at=tuple(map(float, counts.kept)),
    )
    try:
        before = server.scrape()
        reply = server.complete(prompt.tokens, prompt.max_new_tokens)
        other = plain.complete(prompt.tokens, prompt.max_new_tokens) if plain else None
    except (BadData, Incomplete) as error:
        return told.model_copy(update={"failed": str(error)})
    drafted, told_by, note = drafts_of(server, before, reply)
    if drafted and len(drafted.accepted_at) > gamma and any(drafted.accepted_at[gamma:]):
        raise BadData(f"{server.url} drafts more than {gamma} tokens a round: give its number as --gamma")
    at = parting(reply, promise.text)
    return told.model_copy(
        update={
            "num_tokens": reply.num_tokens,
            "first_s": reply.first_s,
            "seconds_a_token": reply.seconds_a_token,
            "plain_seconds_a_token": other.seconds_a_token if other else None,
            "parts_at": at,
            "gap": promise.text.gaps[at] if at is not None and at < len(promise.text.gaps) else None,
            "parts_from_plain_at": first_difference(reply, other) if other else None,
            "rounds": drafted.rounds if drafted else 0,
            "proposed": drafted.proposed if drafted else 0,
            "accepted_at": drafted.accepted_at if drafted else (),
            "told_by": told_by if drafted else "",
            "note": note,
        }
    )


def drafts_of(server: Server, before: Scrape | None, reply: Reply) -> tuple[Drafted | None, str, str]:
    """The rounds of a request, who told of them, and why nobody did."""
    if reply.drafted is not None:
        return reply.drafted, "request", ""
    after = server.settled(before, reply.num_tokens)
    if before is None or after is None:
        return None, "", "the server has no metrics page, and its answers tell nothing of drafts"
    drafted, why = between(before, after, reply.num_tokens)
    return drafted, "metrics", why


def parting(reply: Reply, text: Continuation) -> int | None:
    """The first token at which a served text is not the target's; None where it is the same to its end."""
    if reply.tokens is None:
        return None if reply.text == text.text else 0
    return first_parting(reply.tokens, text.tokens)


def first_difference(reply: Reply, other: Reply) -> int | None:
    if reply.tokens is None or other.tokens is None:
        return None if reply.text == other.text else 0
    return first_parting(reply.tokens, other.tokens)


def first_parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    pairs = enumerate(zip(ours, theirs, strict=False))
    common = min(len(ours), len(theirs))
    at = next((index for index, (one, two) in pairs if one != two), common)
    return None if at == common and len(ours) == len(theirs) else at


# ── what it means ─────────────────────────────────────────────────────────────────────────────────


def judge(prompts: Sequence[ServedPrompt], margin: float, least_documents: int) -> tuple[Verdict, list[str]]:
    """Whether the server accepts what replay promised, within `margin`; and the reasons in words."""
    reasons = texts_said(prompts)
    counted = [prompt for prompt in prompts if prompt.told_by]
    failed = [prompt for prompt in prompts if prompt.failed]
    reasons += [f"{prompt.prompt_id} has no answer: {prompt.failed}" for prompt in failed[:5]]
    silent = [prompt for prompt in prompts if not (prompt.told_by or prompt.failed)]
    for note in dict.fromkeys(prompt.note for prompt in silent):
        count = sum(prompt.note == note for prompt in silent)
        reasons.append(f"{count} of {len(prompts)} prompts tell nothing of drafts: {note}")
    documents = {prompt.document_id for prompt in counted}
    if len(documents) < least_documents:
        why = f"acceptance is known of {len(documents)} documents, and {least_documents} are the least"
        return "not_enough_evidence", [why, *reasons]
    difference = difference_of(counted)
    assert difference is not None
    said = (
        f"served − replayed acceptance is {100 * difference.mean:+.1f} points "
        f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] over {len(documents)} documents; "
        f"{100 * margin:g} points less are tolerated"
    )
    if difference.high < -margin:
        return "fail", [said, *reasons]
    if difference.low < -margin:
        return "not_enough_evidence", [said, *reasons]
    return "pass", [said, *reasons]


def texts_said(prompts: Sequence[ServedPrompt]) -> list[str]:
    answered = [prompt for prompt in prompts if not prompt.failed]
    if not answered:
        return []
    same = sum(prompt.parts_at is None for prompt in answered)
    said = [f"{same} of {len(answered)} texts are the target's own, token for token"]
    parted = [prompt for prompt in answered if prompt.parts_at is not None]
    for prompt in parted[:5]:
        gap = "" if prompt.gap is None else f", where its two best logits are {prompt.gap:.2g} apart"
        said.append(f"{prompt.prompt_id} parts from it at token {prompt.parts_at}{gap}")
    if any(prompt.plain_seconds_a_token is not None for prompt in answered):
        equal = sum(prompt.parts_from_plain_at is None for prompt in answered)
        said.append(f"{equal} of {len(answered)} texts are those of the server without speculation")
    return said


def difference_of(counted: Sequence[ServedPrompt]) -> Interval | None:
    """Served − replayed acceptance, paired by prompt."""
    if not counted:
        return None
    return paired_difference(
        ([p.accepted for p in counted], [p.proposed for p in counted]),
        ([p.replayed_accepted for p in counted], [p.replayed_proposed for p in counted]),
        samples=SAMPLES,
        seed=SEED,
        clusters=[p.document_id for p in counted],
    )


def share(prompts: Sequence[ServedPrompt], of: Callable[[ServedPrompt], tuple[float, float]]) -> Interval:
    pairs = [of(prompt) for prompt in prompts]
    return bootstrap_interval(
        [one for one, _ in pairs],
        [two for _, two in pairs],
        samples=SAMPLES,
        seed=SEED,
        clusters=[prompt.document_id for prompt in prompts],
    )


def by_position(counted: Sequence[ServedPrompt], gamma: int) -> list[Position]:
    def at(values: Sequence[float], position: int) -> float:
        return values[position] if position < len(values) else 0

    return [
        Position(
            position=position + 1,
            served=share(counted, lambda p, i=position: (at(p.accepted_at, i), p.rounds)),  # type: ignore[misc]
            replayed=share(counted, lambda p, i=position: (at(p.replayed_at, i), p.replayed_rounds)),  # type: ignore[misc]
        )
        for position in range(gamma if counted else 0)
    ]


def speeds(prompts: Sequence[ServedPrompt]) -> tuple[float | None, float | None, Interval | None]:
    """Tokens/s behind the first token with and without speculation, and their ratio over the same prompts."""
    timed = [p for p in prompts if p.seconds_a_token]
    both = [p for p in timed if p.plain_seconds_a_token]
    with_it = 1 / mean([p.seconds_a_token or 0.0 for p in timed]) if timed else None
    if not both:
        return with_it, None, None
    ratio = share(both, lambda p: (p.plain_seconds_a_token or 0.0, p.seconds_a_token or 0.0))
    return with_it, 1 / mean([p.plain_seconds_a_token or 0.0 for p in both]), ratio


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
