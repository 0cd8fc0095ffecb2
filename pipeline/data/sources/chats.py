"""What sources of chats share: the messages of a row, and prompts that keep their own length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictStr, field_validator, model_validator

from pipeline.config.data import Context
from pipeline.data.chat import encode_chat, in_chat, render
from pipeline.data.documents import Document, Request
from pipeline.data.prompts import make_prompt
from pipeline.data.reading import BadRow, RawRow, Table, table_rows
from pipeline.data.tokenizer import encode_prompt
from pipeline.store.rows import Prompt

JSON_LINES = (".jsonl", ".jsonl.gz")
# What other programs put into a row and no template is handed here.
NOT_TAKEN = ("functions", "function_call", "tool_choice", "documents", "images", "audio", "videos", "system")


class Message(BaseModel):
    """The fields that are needed of a message; others are for the template alone."""

    role: StrictStr
    content: StrictStr | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        """A list of parts as one text, since most templates take no lists."""
        if not isinstance(content, list):
            return content
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise ValueError(f"a part of it is no text: {json.dumps(part)[:60]}")
        return "".join(part["text"] for part in content)

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs `content` or `tool_calls`")
        return self


def must_reach_template(others: Mapping[str, Any]) -> None:
    """Raises ValueError for a field of a row that is meant for a chat template and cannot be handed to it."""
    left = [field for field in NOT_TAKEN if others.get(field)]
    if left:
        raise ValueError(f"`{left[0]}` reaches no chat template: put it into `messages` or `tools`")


def for_template(given: list[dict[str, Any]], checked: list[Message]) -> list[dict[str, Any]]:
    """Messages as the row has them, fields that are absent or null included, but each content one text."""
    return [
        values | {"content": message.content} if "content" in values else values
        for values, message in zip(given, checked, strict=True)
    ]


def list_rows(file: Path) -> Iterator[RawRow | BadRow]:
    """The rows of a file that is one JSON list."""
    try:
        values = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        yield BadRow(str(file), 0, "unreadable", str(error))
        return
    except (ValueError, RecursionError) as error:
        yield BadRow(str(file), 0, "not JSON", str(error))
        return
    if not isinstance(values, list):
        yield BadRow(str(file), 0, "not a list", "one row a line is JSON lines, *.jsonl")
        return
    for index, row in enumerate(values):
        where = f"{file}:[{index}]"
        yield RawRow(where, index, row) if isinstance(row, dict) else BadRow(where, index, "not an object")


def json_rows(table: Table, what: str) -> Iterator[RawRow | BadRow]:
    """The rows of JSON lines, or of a file that is one JSON list."""
    if table.path.endswith(JSON_LINES):
        return table_rows(table, None, what)
    return list_rows(Path(table.path))


def whole_prompts(
    documents: Iterable[Document], request: Request, contexts: Sequence[Context], least: int = 1
) -> list[Prompt]:
    """Each prompt at the first context that is long enough; of the training split, at the request's own.

    Args:
        least: tokens below which a prompt is left out, and counted.
    """
    made: list[Prompt] = []
    contexts = [request.context] if request.split == "train" else contexts
    for document in documents:
        tokens = prompt_tokens(document, request)
        context = first_that_holds(len(tokens), contexts)
        if context is None:
            request.skipped["prompt longer than every context"] += 1
        elif len(tokens) < least:
            request.skipped[f"prompt of fewer than {least} tokens"] += 1
        elif context.tokens == request.context.tokens:
            if len(made) < request.count:
                made.append(make_prompt(request, len(made), document, tokens))
            else:
                request.skipped["more prompts than data.prompts"] += 1
    return made


def first_that_holds(tokens: int, contexts: Sequence[Context]) -> Context | None:
    """The shortest context with room for a prompt of so many tokens."""
    return min((one for one in contexts if one.tokens >= tokens), key=lambda one: one.tokens, default=None)


def prompt_tokens(document: Document, request: Request) -> list[int]:
    if document.messages is None:
        return encode_prompt(request.tokenizer, document.text)
    in_chat(request.tokenizer, True, document.source)
    chat = render(request.tokenizer, document.messages, document.tools, document.source, document.where)
    return encode_chat(request.tokenizer, chat)
