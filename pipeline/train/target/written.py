"""Answers of a target as a file: JSON lines under xz, so that nobody has to write them again.

The first line says whose they are, the others are a prompt each, found by the hash of its tokens. Beside an
answer's tokens stands the target's arg-max at each of its places, by which another target is noticed when the
labels are made anew.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.config.train import Answers
from pipeline.errors import BadData
from pipeline.store.files import atomic_path, file_sha256
from pipeline.store.rows import Row
from pipeline.train.target.labelling import Text

FIELD = "labels.answers.written"


class Writing(Row):
    """Whose answers a file holds, of at most so many tokens, and at which temperature they were drawn.

    `tokenizer` is the hash of its vocabulary, `target` a name to read.
    """

    format: Literal[1] = 1
    target: str
    tokenizer: str
    temperature: float
    max_tokens: int


class AnsweredPrompt(Row):
    """The answers to one prompt, EOS included, and the target's arg-max at their places, −1 if not known."""

    prompt: str  # of its tokens, as `prompt_hash` has it
    prompt_id: str
    document_id: str
    answers: list[list[int]]
    best: list[list[int]]


def prompt_hash(tokens: Sequence[int]) -> str:
    """SHA-256 of the tokens as 4-byte numbers, little end first."""
    return hashlib.sha256(np.asarray(tokens, "<u4").tobytes()).hexdigest()


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of every token with its id."""
    listed = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def answers_sha256(file: str) -> str:
    """What a fingerprint knows of a file of answers.

    Raises:
        BadData: if it cannot be read.
    """
    try:
        return file_sha256(Path(file))
    except OSError as error:
        raise BadData(f"{FIELD}: {file}: {error.strerror}") from None


def write_answers(file: Path, writing: Writing, prompts: Sequence[AnsweredPrompt]) -> None:
    lines = "".join(row.model_dump_json() + "\n" for row in (writing, *prompts))
    with atomic_path(file) as temporary:
        temporary.write_bytes(lzma.compress(lines.encode(), preset=9))


class WrittenAnswers:
    """The `Engine` of `labelling.py` that takes answers from a file.

    Args:
        asked: `written` is the file.

    Raises:
        BadData: if there is no such file, it is another one, or its answers are of another tokenizer or
            temperature than is asked for.
    """

    least_agreement = 0.98

    def __init__(self, asked: Answers, tokenizer: PreTrainedTokenizerBase, eos: frozenset[int]) -> None:
        assert asked.written
        self.file = file = Path(asked.written)
        self.eos = eos
        self.field, self.said = FIELD, f"arg-maxes in {file}"
        self.advice = "Name a file with this target's own answers"
        try:
            first, *rows = lzma.decompress(file.read_bytes()).decode().splitlines()
            self.writing = Writing.model_validate_json(first)
            self.prompts = {row.prompt: row for row in map(AnsweredPrompt.model_validate_json, rows)}
        except OSError as error:
            raise BadData(f"{FIELD}: {file}: {error.strerror}") from None
        except (lzma.LZMAError, ValueError) as error:
            raise BadData(f"{FIELD}: {file} is no file of answers: {str(error).splitlines()[0]}") from None
        if self.writing.tokenizer != vocabulary_hash(tokenizer):
            raise BadData(
                f"{FIELD}: {file} holds answers of {self.writing.target}, whose tokenizer has another "
                f"vocabulary than this target's. {self.advice}"
            )
        if self.writing.temperature != asked.temperature:
            raise BadData(
                f"{FIELD}: the answers in {file} were drawn at temperature {self.writing.temperature:g}, and "
                f"labels.answers.temperature asks for {asked.temperature:g}"
            )

    def write(
        self, prompts: Mapping[str, Sequence[int]], count: int, ends: bool, copies: int = 1
    ) -> dict[str, list[Text] | None]:
        """As `Engine.write`: what the file has for these prompts. Of texts that never end it has none."""
        if not ends:
            return {}
        there = {name: self.prompts.get(prompt_hash(tokens)) for name, tokens in prompts.items()}
        found: dict[str, list[Text] | None] = {}
        for name, row in there.items():
            texts = [] if row is None else self.texts(row, count)
            if len(texts) >= copies:
                found[name] = list(texts[:copies])
        return found

    def texts(self, row: AnsweredPrompt, count: int) -> list[Text]:
        """The answers cut to `count` tokens, without those that the file has cut shorter.

        An answer without tokens ended at once.

        Raises:
            BadData: if one ends with a token that ends none of this target's.
        """
        most = self.writing.max_tokens
        if odd := [text[-1] for text in row.answers if 0 < len(text) < most and text[-1] not in self.eos]:
            raise BadData(
                f"{FIELD}: in {self.file} an answer to {row.prompt_id} ends with token {odd[0]}, which "
                f"ends no text of this target. {self.advice}"
            )
        return [
            Text(tokens[:count], best[:count])
            for tokens, best in zip(row.answers, row.best, strict=True)
            if len(tokens) >= count or len(tokens) < most
        ]
