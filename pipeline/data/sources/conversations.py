"""Conversations: rows with `messages`, or with `conversations` as ShareGPT names them.

What the assistant says last is left out: the target answers instead, behind everything before. A prompt keeps
its own length, as the user's own prompts do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictStr, model_validator

from pipeline.config.data import Context, ConversationsSource
from pipeline.data.documents import Document, Request, Shard
from pipeline.data.reading import BadRow, RawRow, Table, checked, short_name, text_problem
from pipeline.data.sources.chats import (
    Message,
    first_that_holds,
    for_template,
    json_rows,
    must_reach_template,
    whole_prompts,
)
from pipeline.data.sources.drawn import DrawnReader
from pipeline.data.sources.text import expand
from pipeline.store.rows import Prompt

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system",
}  # fmt: skip
SUFFIXES = (".jsonl", ".jsonl.gz", ".json")
LEAST = 16  # tokens of a training prompt


class Turn(BaseModel):
    """A turn as ShareGPT has it."""

    model_config = ConfigDict(populate_by_name=True, extra="allow")

    value: StrictStr

    @property
    def speaker(self) -> Any:
        return (self.model_extra or {}).get("from")

    @model_validator(mode="after")
    def _known_speaker(self) -> Turn:
        if not isinstance(self.speaker, str) or self.speaker not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(f"`from` is {json.dumps(self.speaker)[:40]}; it can be {known}")
        return self


class ConversationRow(BaseModel):
    """The fields that are needed of a row; others, such as an id, are left alone."""

    model_config = ConfigDict(extra="allow")

    messages: list[Message] | None = None
    conversations: list[Turn] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ConversationRow:
        if (not self.messages) == (not self.conversations):
            raise ValueError("a row needs either a non-empty `messages` or a non-empty `conversations`")
        must_reach_template(self.model_extra or {})
        return self


class ConversationsReader(DrawnReader[ConversationsSource]):
    answered = True

    def shards(self) -> list[Shard]:
        files = sorted({file for pattern in self.source.files for file in expand(pattern, self.root)})
        return [
            Shard(self.source.name, None, number, (Table(str(file)),)) for number, file in enumerate(files)
        ]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        for index, table in enumerate(shard.tables):
            if not table.path.endswith(SUFFIXES):
                kinds = ", ".join(SUFFIXES)
                yield BadRow(table.path, index, "no conversations", f"they are read from {kinds}")
                continue
            for raw in json_rows(table, "conversations"):
                yield raw if isinstance(raw, BadRow) else self._document(raw)

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        return whole_prompts(documents, request, self.data.contexts, LEAST if request.split == "train" else 1)

    def num_prompts(self, tokens: int, context: Context) -> int:
        return int(first_that_holds(tokens, self.data.contexts) == context)

    def _document(self, raw: RawRow) -> Document | BadRow:
        row = checked(raw, ConversationRow)
        if isinstance(row, BadRow):
            return row
        chat = asked(messages_of(raw.values, row))
        if not chat or not any(message["role"] == "user" for message in chat):
            return BadRow(raw.where, raw.index, "nothing is asked", "no turn of the user before the answer")
        text = "\n".join(str(message.get("content") or "") for message in chat)
        others = json.dumps([chat, row.tools], ensure_ascii=False)
        if problem := text_problem(text, 1) or text_problem(others, 1):
            return BadRow(raw.where, raw.index, *problem)
        return Document(
            document_id=f"{self.source.name}/{short_name(raw.where, self.root)}",
            source=self.source.name,
            split=self.split(text),
            text=text,
            messages=chat,
            tools=row.tools,
            where=raw.where,
        )


def messages_of(values: dict[str, Any], row: ConversationRow) -> list[dict[str, Any]]:
    """The whole conversation as chat templates take it."""
    if row.messages:
        return for_template(values["messages"], row.messages)
    return [{"role": ROLES[turn.speaker], "content": turn.value} for turn in row.conversations or []]


def asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without what the assistant says last, which the target will say in its own words."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
