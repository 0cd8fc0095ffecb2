"""The user's own prompts: JSON lines or a JSON list with `prompt` or `messages`, or one text file a prompt.

They keep their own length: each goes to the first context that is long enough, and one that is longer than
every context is left out and counted. So "exact length" holds for all data sets but these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictStr, field_validator, model_validator

from pipeline.config.data import Context, PromptsSource
from pipeline.data.documents import BYTE_ORDER_MARK, Document, Reader, Request, Shard
from pipeline.data.prompts import make_prompt
from pipeline.data.reading import BadRow, RawRow, Table, checked, short_name, table_rows, text_problem
from pipeline.data.sources.text import expand, read_text
from pipeline.data.tokenizer import encode_prompt
from pipeline.errors import BadData
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


class UserRow(BaseModel):
    """The fields that are needed of a row; others, such as an id, are left alone."""

    model_config = ConfigDict(extra="allow")

    prompt: StrictStr | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> UserRow:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("a row needs either `prompt` or a non-empty `messages`")
        if self.tools and not self.messages:
            raise ValueError("`tools` go with `messages`, not with `prompt`")
        left = [field for field in NOT_TAKEN if self.messages and (self.model_extra or {}).get(field)]
        if left:
            raise ValueError(f"`{left[0]}` reaches no chat template: put it into `messages` or `tools`")
        return self


class PromptsReader(Reader[PromptsSource]):
    def shards(self) -> list[Shard]:
        files = sorted({file for pattern in self.source.files for file in expand(pattern, self.root)})
        return [Shard(self.source.name, "test", 0, tuple(Table(str(file)) for file in files))]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        for index, table in enumerate(shard.tables):
            if table.path.endswith(JSON_LINES):
                rows = table_rows(table, None, "the user's prompts")
            elif table.path.endswith(".json"):
                rows = list_rows(Path(table.path))
            else:
                text = read_text(Path(table.path), index)
                whole = text if isinstance(text, BadRow) else RawRow(table.path, index, {"prompt": text})
                rows = iter([whole])
            for raw in rows:
                yield raw if isinstance(raw, BadRow) else self._document(raw)

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        made: list[Prompt] = []
        for document in documents:
            tokens = self._tokens(document, request)
            if self.num_prompts(len(tokens), request.context):
                if len(made) < request.count:
                    made.append(make_prompt(request, len(made), document, tokens))
                else:
                    request.skipped["more prompts than data.prompts"] += 1
            elif not any(self.num_prompts(len(tokens), context) for context in self.data.contexts):
                request.skipped["prompt longer than every context"] += 1
        return made

    def num_prompts(self, tokens: int, context: Context) -> int:
        """Whole, at the first context that is long enough."""
        fitting = [one.tokens for one in self.data.contexts if one.tokens >= tokens]
        return int(context.tokens == min(fitting, default=0))

    def version(self, files: Iterable[Path]) -> int:
        return 2

    def _document(self, raw: RawRow) -> Document | BadRow:
        row = checked(raw, UserRow)
        if isinstance(row, BadRow):
            return row
        if row.messages and not self.source.chat_template:
            return BadRow(raw.where, raw.index, "messages", "they need the source's chat_template: true")
        if row.messages:
            text = "\n".join(message.content or "" for message in row.messages)
            chat = for_template(raw.values["messages"], row.messages)
        else:
            text = (row.prompt or "").lstrip(BYTE_ORDER_MARK)
            chat = [{"role": "user", "content": text}]
        others = json.dumps([chat, row.tools], ensure_ascii=False)
        if problem := text_problem(text, 1) or text_problem(others, 1):
            return BadRow(raw.where, raw.index, *problem)
        return Document(
            document_id=f"{self.source.name}/{short_name(raw.where, self.root)}",
            source=self.source.name,
            split="test",
            text=text,
            messages=chat if self.source.chat_template else None,
            tools=row.tools,
            where=raw.where,
        )

    def _tokens(self, document: Document, request: Request) -> list[int]:
        if document.messages is None:
            return encode_prompt(request.tokenizer, document.text)
        if request.tokenizer.chat_template is None:
            raise BadData(
                f"source {self.source.name!r}: chat_template is true, but the tokenizer has no chat "
                "template: use a chat model's tokenizer, or set chat_template: false"
            )
        try:
            text = request.tokenizer.apply_chat_template(
                document.messages, tools=document.tools, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever the template raises for what is in the row
            raise BadData(
                f"source {self.source.name!r}: the tokenizer's chat template refuses {document.where}: "
                f"{' '.join(str(error).split())[:200]}. Change this row, or take it out"
            ) from error
        # The template writes special tokens, BOS among them, as text: here they are meant.
        tokens: list[int] = request.tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"]
        return tokens


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
