"""The user's own prompts: JSON lines with `prompt` or `messages`, or one text file a prompt.

They keep their own length: each goes to the first context that is long enough, and one that is longer than
every context is left out and counted. So "exact length" holds for all data sets but these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, StrictStr, model_validator

from pipeline.config.data import Context, PromptsSource
from pipeline.data.documents import Document, Reader, Request, Shard
from pipeline.data.prompts import bos, make_prompt
from pipeline.data.reading import BadRow, RawRow, Table, checked, table_rows, text_problem
from pipeline.data.sources.text import expand, read_text
from pipeline.data.tokenizer import encode
from pipeline.errors import BadData
from pipeline.store.rows import Prompt

JSON_LINES = (".jsonl", ".jsonl.gz")


class Message(BaseModel):
    role: StrictStr
    content: StrictStr


class UserRow(BaseModel):
    prompt: StrictStr | None = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> UserRow:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("a row needs either `prompt` or a non-empty `messages`")
        return self


class PromptsReader(Reader[PromptsSource]):
    def shards(self) -> list[Shard]:
        files = sorted({file for pattern in self.source.files for file in expand(pattern, self.root)})
        return [Shard(self.source.name, "test", 0, tuple(Table(str(file)) for file in files))]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        for index, table in enumerate(shard.tables):
            if table.path.endswith(JSON_LINES) and not Path(table.path).is_dir():
                rows = table_rows(table, None, "the user's prompts")
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

    def _document(self, raw: RawRow) -> Document | BadRow:
        row = checked(raw, UserRow)
        if isinstance(row, BadRow):
            return row
        if row.messages is not None and not self.source.chat_template:
            return BadRow(raw.where, raw.index, "messages", "they need the source's chat_template: true")
        messages = [m.model_dump() for m in row.messages or [Message(role="user", content=row.prompt or "")]]
        text = "\n".join(message["content"] for message in messages)
        if problem := text_problem(text, 1):
            return BadRow(raw.where, raw.index, *problem)
        return Document(
            document_id=f"{self.source.name}/{Path(raw.where).name}",
            source=self.source.name,
            split="test",
            text=text,
            messages=messages if self.source.chat_template else None,
        )

    def _tokens(self, document: Document, request: Request) -> list[int]:
        if document.messages is None:
            return bos(request) + encode(request.tokenizer, document.text)
        if request.tokenizer.chat_template is None:
            raise BadData(
                f"source {self.source.name!r}: chat_template is true, but the tokenizer has no chat "
                "template: use a chat model's tokenizer, or set chat_template: false"
            )
        text = request.tokenizer.apply_chat_template(
            document.messages, tokenize=False, add_generation_prompt=True
        )
        # The template writes special tokens, BOS among them, as text: here they are meant.
        tokens: list[int] = request.tokenizer(str(text), add_special_tokens=False)["input_ids"]
        return tokens
