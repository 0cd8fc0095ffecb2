"""Evaluation prompts of exact token lengths.

Three ways to reach a length: a piece of a document (`continuation_prompts`), a templated prompt whose text is
cut while its instruction and question stay whole (`template_prompts`), and a haystack with needles
(`needle_prompts`). Every prompt starts with BOS where the tokenizer begins texts with one, and BOS counts.
Documents take turns, so that neighbouring prompts come from different documents as long as there are any.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from typing import Literal, TypeVar

import numpy as np

from pipeline.data.chat import encode_chat, sides_in_chat
from pipeline.data.documents import Document, Request
from pipeline.data.tokenizer import beginning, encode, encode_with_offsets
from pipeline.errors import BadData
from pipeline.store.rows import Prompt

Cut = Literal["text end", "middle", "end"]
Piece = TypeVar("Piece")
TOO_SHORT = "document shorter than the context"  # why a document gives no prompt
CITIES = (
    "Accra", "Bergen", "Cusco", "Dakar", "Edinburgh", "Florence", "Granada", "Hanoi", "Istanbul", "Jaipur",
    "Kyoto", "Lisbon", "Montreal", "Nairobi", "Oslo", "Prague", "Quito", "Riga", "Santiago", "Tbilisi",
    "Utrecht", "Valencia", "Warsaw", "Zagreb",
)  # fmt: skip


# ── pieces of documents ───────────────────────────────────────────────────────────────────────────


def places(num_tokens: int, piece: int, most: int) -> list[int]:
    """Starts of at most `most` non-overlapping pieces: each in the middle of its own equal segment."""
    count = min(most, num_tokens // piece)
    return [(2 * k + 1) * num_tokens // (2 * count) - piece // 2 for k in range(count)]


def find_places(num_tokens: int, piece: int, request: Request) -> list[int]:
    """Places of pieces in a document; one without any is counted."""
    found = places(num_tokens, piece, request.per_document)
    if not found:
        request.skipped[TOO_SHORT] += 1
    return found


def take_turns(
    documents: Iterable[Document], request: Request, pieces: Callable[[Document], list[Piece]]
) -> Iterator[tuple[Document, Piece]]:
    """First pieces of all documents, then second pieces, … at most `request.count`."""
    kept: dict[str, list[tuple[Document, Piece]]] = {}
    for document in documents:
        if len(kept) == request.count:
            break  # as many first pieces as are wanted: the rest of the split need not be read
        if found := pieces(document):
            without_text = document.model_copy(update={"text": ""})
            kept.setdefault(document.document_id, []).extend((without_text, piece) for piece in found)
    turns = (item for item in chain.from_iterable(zip_longest(*kept.values())) if item is not None)
    for _, item in zip(range(request.count), turns, strict=False):
        yield item


def continuation_prompts(documents: Iterable[Document], request: Request) -> list[Prompt]:
    """BOS and a piece of a document, from several places of it."""
    head = bos(request)
    piece = request.context.tokens - len(head)

    def pieces(document: Document) -> list[np.ndarray]:
        tokens = np.asarray(encode(request.tokenizer, document.text), dtype=np.int32)
        return [tokens[p : p + piece] for p in find_places(len(tokens), piece, request)]

    chosen = take_turns(documents, request, pieces)
    return [make_prompt(request, i, d, [*head, *tokens.tolist()]) for i, (d, tokens) in enumerate(chosen)]


# ── templates ─────────────────────────────────────────────────────────────────────────────────────


def split_template(template: str, hole: str, values: dict[str, str], name: str) -> tuple[str, str]:
    """The template's text before and after `{hole}`, its other fields filled from `values`.

    Raises:
        BadData: if `{hole}` is not there exactly once or another field is unknown; names the template.
    """
    sides = [""]
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadData(
            f"the template of {name} is broken ({error}); a literal brace is written twice"
        ) from None
    for literal, field, _, _ in fields:
        sides[-1] += literal
        if field == hole:
            sides.append("")
        elif field is not None:
            if field not in values:
                known = ", ".join(f"{{{n}}}" for n in (hole, *values))
                raise BadData(f"the template of {name} names {{{field}}}; its fields are {known}")
            sides[-1] += values[field]
    if len(sides) != 2:
        raise BadData(f"the template of {name} must hold {{{hole}}} exactly once, not {len(sides) - 1} times")
    return sides[0], sides[1]


def cut_template(document: Document, request: Request, cut: Cut, chat: bool = False) -> list[int] | None:
    """The templated prompt at exactly the context's length, or None (counted) if that cannot be.

    With `chat` it is what a user says, in the tokenizer's chat template, whose parts are encoded apart.

    `text end` drops the text's last tokens. `middle` keeps the first and the last half of the whole prompt,
    as LongBench does; `end` keeps the first tokens whatever they are. A prompt that is no chat is encoded at
    once, so that tokens across a template's borders are those that a user would get.
    """
    head, before, after = bos(request), document.before, document.after
    if chat:  # the template's special tokens are meant, and what looks like one in the text is text
        head, (before, after) = [], sides_in_chat(request.tokenizer, before, after, document.source)
        front, back = (encode_chat(request.tokenizer, side) for side in (before, after))
        tokens = [*front, *encode(request.tokenizer, document.text), *back]
        num_before, num_after = len(front), len(back)
    else:
        full = before + document.text + after
        tokens, starts, ends = encode_with_offsets(request.tokenizer, full)
        # A token across a border counts as template, so that the template survives whole.
        num_before = int(np.searchsorted(starts, len(before)))
        num_after = len(tokens) - int(np.searchsorted(ends, len(full) - len(after), side="right"))
    room = request.context.tokens - len(head)
    if len(tokens) < room:
        request.skipped[TOO_SHORT] += 1
        return None
    if cut == "end":
        return head + tokens[:room]
    first = room - num_after if cut == "text end" else room // 2
    last = room - first
    if first < num_before or last < num_after:
        request.skipped["question or instruction longer than its share of the context"] += 1
        return None
    return head + tokens[:first] + tokens[len(tokens) - last :]


def template_prompts(
    documents: Iterable[Document], request: Request, cut: Cut, chat: bool = False
) -> list[Prompt]:
    """A prompt of each document; of several questions about one text the second waits for all other texts."""

    def pieces(document: Document) -> list[list[int]]:
        tokens = cut_template(document, request, cut, chat)
        return [] if tokens is None else [tokens]

    chosen = take_turns(documents, request, pieces)
    return [make_prompt(request, i, document, tokens) for i, (document, tokens) in enumerate(chosen)]


def asking_prompts(documents: Iterable[Document], request: Request, chat: bool) -> list[Prompt]:
    """What is asked of a document, about pieces of it from several places."""

    def pieces(document: Document) -> list[list[int]]:
        tokens, starts, ends = encode_with_offsets(request.tokenizer, document.text)
        wanted = request.context.tokens  # what is asked takes room: so much text is enough
        cut = [
            cut_template(
                document.model_copy(update={"text": document.text[starts[at] : ends[at + wanted - 1]]}),
                request,
                "text end",
                chat,
            )
            for at in find_places(len(tokens), wanted, request)
        ]
        return [prompt for prompt in cut if prompt is not None]

    chosen = take_turns(documents, request, pieces)
    return [make_prompt(request, i, document, tokens) for i, (document, tokens) in enumerate(chosen)]


# ── needles ───────────────────────────────────────────────────────────────────────────────────────


def needle_prompts(
    documents: Iterable[Document],
    request: Request,
    template: str,
    needle: str,
    num_needles: int,
    chat: bool = False,
) -> list[Prompt]:
    """Book text with `num_needles` seeded needles, their depths swept over the prompts.

    One needle's depth runs from 0 to 100 % over the prompts; several are spread evenly and shifted from one
    prompt to the next. A needle is moved back to the end of a sentence.
    """
    head = [] if chat else bos(request)
    # A haystack is its tokens and, in a second row, whether a sentence ends with each. The needles take room
    # from it, so a piece of the whole length is enough.
    wanted = request.context.tokens - len(head)

    def pieces(document: Document) -> list[np.ndarray]:
        tokens, _, ends = encode_with_offsets(request.tokenizer, document.text)
        closes = [document.text[end - 1 : end] in (".", "!", "?") for end in ends]
        both = np.asarray([tokens, closes], dtype=np.int32)
        return [both[:, p : p + wanted] for p in find_places(len(tokens), wanted, request)]

    prompts: list[Prompt] = []
    haystacks = list(take_turns(documents, request, pieces))
    for i, (document, hay) in enumerate(haystacks):
        draw = random.Random(f"{request.seed}/{request.dataset}/{request.context.name}/{request.split}/{i}")
        cities = draw.sample(CITIES, num_needles)
        numbers = [str(draw.randrange(1_000_000, 10_000_000)) for _ in cities]
        before, after = split_template(template, "context", {"question": question(cities)}, request.dataset)
        if chat:
            before, after = sides_in_chat(request.tokenizer, before, after, request.dataset)
        in_template = encode_chat if chat else encode
        front, back = in_template(request.tokenizer, before), in_template(request.tokenizer, after)
        inserts = [
            encode(request.tokenizer, needle.format(city=city, number=number))
            for city, number in zip(cities, numbers, strict=True)
        ]
        room = wanted - len(front) - len(back) - sum(map(len, inserts))
        if room < 1:
            request.skipped["question and needles longer than the context"] += 1
            continue
        turn = i / max(len(haystacks) - 1, 1)
        depths = [turn] if num_needles == 1 else [(k + turn) / num_needles for k in range(num_needles)]
        body = insert(hay[:, :room], inserts, depths)
        tokens = [*head, *front, *body, *back]
        prompts.append(make_prompt(request, i, document, tokens, answers=numbers, scoring="contains"))
    return prompts


def question(cities: list[str]) -> str:
    if len(cities) == 1:
        return f"What is the special magic {cities[0]} number?"
    comma = "," if len(cities) > 2 else ""
    return f"What are the special magic numbers for {', '.join(cities[:-1])}{comma} and {cities[-1]}?"


def insert(hay: np.ndarray, inserts: list[list[int]], depths: list[float]) -> list[int]:
    """`hay` [2, tokens] (ids, sentence ends) with each insert at its depth, moved back to a sentence end."""
    tokens, closes = hay.tolist()
    body: list[int] = []
    done = 0
    for needle, depth in zip(inserts, depths, strict=True):
        position = round(depth * len(tokens))
        while position > done and not closes[position - 1]:
            position -= 1
        body += tokens[done:position] + needle
        done = position
    return body + tokens[done:]


# ── shared ────────────────────────────────────────────────────────────────────────────────────────


def bos(request: Request) -> list[int]:
    """[BOS], or nothing for a tokenizer that begins texts without one."""
    return beginning(request.tokenizer)


def make_prompt(
    request: Request,
    number: int,
    document: Document,
    tokens: list[int],
    answers: list[str] | None = None,
    scoring: Literal["none", "contains"] = "none",
) -> Prompt:
    own_limit = document.max_new_tokens or request.max_new_tokens
    return Prompt(
        prompt_id=f"{request.dataset}/{request.context.name}/{request.split}/{number:04d}",
        document_id=document.document_id,
        dataset=request.dataset,
        context=request.context.name,
        split=request.split,
        tokens=tokens,
        max_new_tokens=min(own_limit, request.max_new_tokens),
        answers=document.answers if answers is None else answers,
        scoring=scoring,
    )
