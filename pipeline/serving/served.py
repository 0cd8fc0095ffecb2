"""What a server did with a run's evaluation prompts, one by one, beside their replayed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import BadData, Incomplete
from pipeline.serving.client import Drafted, Reply, Scrape, Server, between
from pipeline.store.rows import Continuation, Prompt, PromptRow, Row


@dataclass(frozen=True)
class Promise:
    """A prompt with the target's own greedy text, and its replayed row of the cell that is served."""

    prompt: Prompt
    text: Continuation
    row: PromptRow


class Clock(Row):
    """Of one answer: seconds to its first tokens, and how many came behind them in `decode_s`."""

    first_s: float
    decode_s: float
    decoded: int


class ServedPrompt(Row):
    """One prompt: what the server drafted and how long it took, and where its text parts from the target's.

    `gap` is the difference of the target's two best logits where the texts part: a small one is rounding; it
    is None where one text ends, or the server gives no token ids. `told_by` says whether the counts came with
    the answer or from the metrics page; "" where there are none, and `note` says why. `failed` holds the
    error of a prompt without an answer, `plain_failed` that of the server without speculation.
    """

    prompt_id: str
    document_id: str
    dataset: str
    context: str
    clock: Clock | None = None
    plain_clock: Clock | None = None
    parts_at: int | None = None
    gap: float | None = None
    parts_from_plain_at: int | None = None
    rounds: int = 0
    proposed: int = 0
    accepted_at: tuple[int, ...] = ()
    replayed_rounds: float
    replayed_at: tuple[float, ...]
    told_by: str = ""
    note: str = ""
    failed: str = ""
    plain_failed: str = ""


def ask(promise: Promise, server: Server, plain: Server | None) -> ServedPrompt:
    """Send a prompt to the server, then to the one without speculation. Errors are kept in the row."""
    prompt, counts = promise.prompt, promise.row.counts
    told = ServedPrompt(
        prompt_id=prompt.prompt_id,
        document_id=prompt.document_id,
        dataset=prompt.dataset,
        context=prompt.context,
        replayed_rounds=counts.num_rounds,
        replayed_at=tuple(map(float, counts.kept)),
    )
    try:
        before = server.scrape()
        reply = server.complete(prompt.tokens, prompt.max_new_tokens)
        drafted, told_by, note = drafts_of(server, before, reply)
    except (BadData, Incomplete) as error:
        return told.model_copy(update={"failed": str(error)})
    at = parting(reply, promise.text)
    told = told.model_copy(
        update={
            "clock": clock_of(reply),
            "parts_at": at,
            "gap": gap_at(reply, promise.text, at),
            "rounds": drafted.rounds if drafted else 0,
            "proposed": drafted.proposed if drafted else 0,
            "accepted_at": drafted.accepted_at if drafted else (),
            "told_by": told_by if drafted else "",
            "note": note,
        }
    )
    if plain is None:
        return told
    try:
        other = plain.complete(prompt.tokens, prompt.max_new_tokens)
    except (BadData, Incomplete) as error:
        return told.model_copy(update={"plain_failed": str(error)})
    apart = first_difference(reply, other)
    return told.model_copy(update={"plain_clock": clock_of(other), "parts_from_plain_at": apart})


def clock_of(reply: Reply) -> Clock:
    return Clock(first_s=reply.first_s, decode_s=reply.decode_s, decoded=reply.decoded)


def drafts_of(server: Server, before: Scrape | None, reply: Reply) -> tuple[Drafted | None, str, str]:
    """The rounds of a request, who told of them, and why nobody did."""
    if reply.drafted is not None:
        return reply.drafted, "request", ""
    after = server.settled(before, reply.num_tokens) if before else None
    if before is None or after is None:
        return None, "", "there is no metrics page with counters, and answers tell nothing of drafts"
    drafted, why = between(before, after, reply.num_tokens)
    return drafted, "metrics", why


def parting(reply: Reply, text: Continuation) -> int | None:
    """The first token at which a served text is not the target's; None where it is the same to its end."""
    if reply.tokens is None:
        return None if reply.text == text.text else 0
    return first_parting(reply.tokens, text.tokens)


def gap_at(reply: Reply, text: Continuation, at: int | None) -> float | None:
    """The target's top-2 gap where both texts have a token, and another one."""
    if at is None or reply.tokens is None or at >= min(len(reply.tokens), len(text.tokens), len(text.gaps)):
        return None
    return text.gaps[at]


def first_difference(reply: Reply, other: Reply) -> int | None:
    if reply.tokens is None or other.tokens is None:
        return None if reply.text == other.text else 0
    return first_parting(reply.tokens, other.tokens)


def first_parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    common = min(len(ours), len(theirs))
    at = next((i for i, (one, two) in enumerate(zip(ours, theirs, strict=False)) if one != two), common)
    return None if at == common and len(ours) == len(theirs) else at
