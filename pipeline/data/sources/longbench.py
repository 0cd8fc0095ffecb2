"""LongBench's 13 English tasks: an instruction and a question around a long context.

With the paths of LongBench's own `dataset2prompt.json` and `dataset2maxlen.json` its wording and answer
lengths are used; otherwise the wording below, and the manifest says which.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, StrictStr

from pipeline.config.data import LongBenchSource
from pipeline.data.chat import in_chat
from pipeline.data.documents import MIN_CHARS, Document, Reader, Request, Shard
from pipeline.data.prompts import Cut, split_template, template_prompts
from pipeline.data.reading import (
    BadRow,
    Table,
    checked,
    local_path,
    must_be_file,
    table_rows,
    text_problem,
    unreachable,
)
from pipeline.errors import BadData
from pipeline.store.rows import Prompt

REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"
ARCHIVE = "data.zip"

# Our own wording: what each task asks for, in few words.
_ANSWER = "\n\nQuestion: {input}\nAnswer in a few words, with nothing else: "
_PASSAGES = "The passages below hold what is needed to answer a question.\n\n{context}" + _ANSWER
TEMPLATES = {
    "narrativeqa": "Below is a story. A question about it follows.\n\n{context}" + _ANSWER,
    "qasper": "Below is a research paper. A question about it follows.\n\n{context}\n\nQuestion: {input}\n"
    'Answer briefly from the paper; say "unanswerable" if it does not tell: ',
    "multifieldqa_en": "Below is a document. A question about it follows.\n\n{context}" + _ANSWER,
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": "Below is a government report.\n\n{context}\n\nA one-page summary of this report: ",
    "qmsum": "Below is the transcript of a meeting. A request about it follows.\n\n{context}\n\n"
    "Request: {input}\nResponse, in one or a few sentences: ",
    "multi_news": "Below are several news articles on one event.\n\n{context}\n\n"
    "A one-page summary of all of them: ",
    "trec": "Each question below is followed by its type.\n\n{context}\n{input}",
    "triviaqa": "Answer the last question from its passage, as the examples do.\n\n{context}\n\n{input}",
    "samsum": "Summarize the last dialogue, as the examples do.\n\n{context}\n\n{input}",
    "passage_retrieval_en": "Below are numbered paragraphs. An abstract of one follows.\n\n{context}\n\n"
    'Abstract: {input}\nThe number of its paragraph, in the form "Paragraph 7": ',
}
MAX_NEW_TOKENS = {
    "narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "musique": 32,
    "gov_report": 512, "qmsum": 512, "multi_news": 512, "trec": 64, "triviaqa": 32, "samsum": 128,
    "passage_retrieval_en": 32,
}  # fmt: skip
# Their examples are not in a chat's turns, so that they are not put into a chat.
FEW_SHOT = ("trec", "triviaqa", "samsum")

Value = TypeVar("Value", str, int)


class Task(BaseModel):
    """The fields that are needed of a row."""

    input: StrictStr
    context: StrictStr
    answers: list[StrictStr] = []
    id: str = Field("", alias="_id")


class LongBenchReader(Reader[LongBenchSource]):
    per_document = 1

    @property
    def what(self) -> str:
        task = self.source.task
        return (
            f"LongBench's {task}.jsonl or {task}.jsonl.gz (in {ARCHIVE} of the hub's THUDM/LongBench: "
            f"https://huggingface.co/datasets/THUDM/LongBench/resolve/{REVISION}/{ARCHIVE}, "
            f"member data/{task}.jsonl)"
        )

    def shards(self) -> list[Shard]:
        # Read here, so that a wrong file of templates stops the run before any work.
        split_template(self.template, "context", {"input": ""}, f"source {self.source.name!r}")
        assert self.max_new_tokens > 0
        return [Shard(self.source.name, "test", 0, (self._table(),))]

    def documents(self, shard: Shard) -> Iterator[Document | BadRow]:
        for raw in table_rows(shard.tables[0], None, self.what):
            row = raw if isinstance(raw, BadRow) else checked(raw, Task)
            if isinstance(row, BadRow):
                yield row
            elif problem := (
                text_problem(row.context, MIN_CHARS)
                or text_problem(row.input or "-", 1)
                or text_problem("-".join(["", row.id, *row.answers]), 1)
            ):
                yield BadRow(raw.where, raw.index, *problem)
            else:
                before, after = split_template(
                    self.template, "context", {"input": row.input}, f"source {self.source.name!r}"
                )
                yield Document(
                    document_id=f"{self.source.name}/{row.id or raw.index}",
                    source=self.source.name,
                    split="test",
                    text=row.context,
                    before=before,
                    after=after,
                    answers=row.answers,
                    max_new_tokens=self.max_new_tokens,
                )

    def prompts(self, documents: Iterable[Document], request: Request) -> list[Prompt]:
        asked_for = self.source.chat_template
        if asked_for is None and self.source.task in FEW_SHOT:
            asked_for = False
        chat = in_chat(request.tokenizer, asked_for, self.source.name)
        cut: Cut = "end" if self.source.truncation == "paper" else "middle"
        return template_prompts(documents, request, cut, chat)

    def origin(self) -> dict[str, str]:
        def name(file: str | None) -> str:
            return "built-in" if file is None else f"published file {local_path(file, self.root)}"

        return {
            "longbench_templates": name(self.source.prompts_file),
            "longbench_max_lengths": name(self.source.max_lengths_file),
            "truncation": self.source.truncation,
        }

    def extra_files(self) -> list[Path]:
        files = (self.source.prompts_file, self.source.max_lengths_file)
        return [local_path(file, self.root) for file in files if file is not None]

    def version(self, files: Iterable[Path]) -> int:
        """A target's own tokenizer may have a chat template."""
        return 3 if self.data.tokenizer.kind == "target" else 2

    @cached_property
    def template(self) -> str:
        task = self.source.task
        return published(self.source.prompts_file, task, str, self.root) or TEMPLATES[task]

    @cached_property
    def max_new_tokens(self) -> int:
        task = self.source.task
        return published(self.source.max_lengths_file, task, int, self.root) or MAX_NEW_TOKENS[task]

    def _table(self) -> Table:
        task, path = self.source.task, self.source.path
        if self.on_hub:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

            try:
                archive = Path(hf_hub_download(path, ARCHIVE, repo_type="dataset", revision=REVISION))
            except (ConnectionError, HfHubHTTPError, LocalEntryNotFoundError) as error:
                raise unreachable(path, self.what, error) from error
        else:
            archive = local_path(path, self.root)
        if archive.is_dir():
            for file in (archive / f"{task}.jsonl", archive / f"{task}.jsonl.gz"):
                if file.exists():
                    must_be_file(file, self.what)
                    return Table(str(file))
            if (archive / ARCHIVE).exists():
                archive = archive / ARCHIVE
            else:
                raise BadData(
                    f"{archive} has no {task}.jsonl, {task}.jsonl.gz or {ARCHIVE}: put {self.what} there"
                )
        must_be_file(archive, self.what)
        try:
            members = zipfile.ZipFile(archive).namelist()
        except zipfile.BadZipFile as error:
            raise BadData(f"{archive} is not a whole zip file ({error}): it should be {self.what}") from None
        for member in (f"data/{task}.jsonl", f"{task}.jsonl"):
            if member in members:
                return Table(str(archive), member=member)
        raise BadData(f"{archive} has no member data/{task}.jsonl: it should be {self.what}")


def published(file: str | None, task: str, kind: type[Value], root: Path) -> Value | None:
    """The task's entry in one of LongBench's own JSON files, or None without a file."""
    if file is None:
        return None
    path = local_path(file, root)
    must_be_file(path, "LongBench's dataset2prompt.json or dataset2maxlen.json")
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadData(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get(task), kind):
        raise BadData(f"{path} has no {kind.__name__} for the task {task!r}")
    value: Value = table[task]
    return value
