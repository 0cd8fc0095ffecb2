"""The user's own prompts: JSON lines or a JSON list with `prompt` or `messages`, or one text file a prompt.

They keep their own length: each goes to the first context that is long enough, and one that is longer than
every context is left out and counted. So "exact length" holds for all data sets but these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictStr, model_validator

from pipeline.config.data import Context, PromptsSource
from pipeline.data.documents import BYTE_ORDER_MARK, Document, Reader, Request, Shard
from pipeline.data.reading import BadRow, RawRow, Table, checked, short_name, text_problem
from pipeline.data.sources.chats import (
    JSON_LINES,
    Message,
    first_that_holds,
    for_template,
    json_rows,
    must_reach_template,
    whole_prompts,
)
from pipeline.data.sources.text import expand, read_text
from pipeline.store.rows import Prompt


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
        if self.messages:
            must_reach_template(self.model_extra or {})
        return self


class PromptsReader(Reader[PromptsSource]):
    def shards(self) -> list[Shard]:
        files = sorted({file for pattern in self.source.files for file in expand(pattern, self.root)})
        return [Shard(self.source.name, "test", 0, tuple(Table(str(file)) for file in files))]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        for index, table in enumerate(shard.tables):
            if table.path.endswith((*JSON_LINES, ".json")):
                rows = json_rows(table, "the user's prompts")
            else:
                text = read_text(Path(table.path), index)
                whole = text if isinstance(text, BadRow) else RawRow(table.path, index, {"prompt": text})
                rows = iter([whole])
            for raw in rows:
                yield raw if isinstance(raw, BadRow) else self._document(raw)

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        return whole_prompts(documents, request, self.data.contexts)

    def num_prompts(self, tokens: int, context: Context) -> int:
        return int(first_that_holds(tokens, self.data.contexts) == context)

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
