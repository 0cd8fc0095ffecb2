"""All data sets by their `kind`, and what the stage asks of all of them at once."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.axes import Place
from pipeline.config.data import Context, Data, Split
from pipeline.config.models import PretrainedModel
from pipeline.config.schema import Config
from pipeline.data.documents import Dropped, Part, Reader, Request, Shard, distinct, read_parts
from pipeline.data.tokenizer import read_tokenizer
from pipeline.errors import BadData
from pipeline.store.files import fingerprint, write_rows, write_text
from pipeline.store.layout import ASKED, DOCUMENTS, PROMPTS, TOKENIZER
from pipeline.store.rows import Row
from pipeline.store.storage import with_home

LISTED_FILES = 20
READING = 2  # raised when pretrained tokenizers are made to read the same prompts into other tokens
log = logging.getLogger(__name__)


class PromptSummary(Row):
    """What one task of prompts made: its file, and the documents that gave none, by reason."""

    file: str
    num_prompts: int
    num_documents: int
    skipped: dict[str, int]


@dataclass(frozen=True)
class PromptTask:
    """One file of prompts to write: a data set, a split, a context.

    Args:
        dropped: documents that give none, by file.
    """

    reader: Reader[Any]
    split: Split
    context: Context
    count: int
    max_new_tokens: int
    parts: tuple[Part, ...]
    dropped: Dropped = field(default_factory=dict)

    @property
    def file(self) -> str:
        return f"{self.split}-{self.reader.source.name}-{self.context.name}.jsonl"

    @property
    def place(self) -> Place:
        return Place(self.reader.source.name, self.context.name)

    @property
    def folder(self) -> str:
        return ASKED if self.split == "train" else PROMPTS


def local_files(readers: dict[str, Reader[Any]], shards: list[Shard]) -> dict[str, list[Path]]:
    """The files on this machine that each source reads."""
    files: dict[str, list[Path]] = {name: reader.extra_files() for name, reader in readers.items()}
    for shard in shards:
        files[shard.source] += [Path(table.path) for table in shard.tables if table.hub_split is None]
    return files


def stage_inputs(
    config: Config, readers: dict[str, Reader[Any]], files: dict[str, list[Path]]
) -> dict[str, Any]:
    """All that the prepared data depends on; local files by size and time of change."""
    stats = {str(file): file.stat() for source_files in files.values() for file in source_files}
    inputs: dict[str, Any] = {
        **settings(config),
        "files": fingerprint({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}),
    }
    versions = {name: reader.version(files[name]) for name, reader in readers.items()}
    if later := {name: version for name, version in versions.items() if version > 1}:
        inputs["readers"] = later
    if config.data.tokenizer.kind == "target":
        assert isinstance(config.target, PretrainedModel)
        folder = with_home(config.target.path)
        source_files = (
            sorted(folder.glob("*token*")) + sorted(folder.glob("*.jinja")) if folder.is_dir() else []
        )
        inputs["tokenizer"] = {
            "version": READING,
            "path": config.target.path,
            "revision": config.target.revision,
            "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in source_files},
        }
    return inputs


def settings(config: Config) -> dict[str, Any]:
    """What of a config the prepared data depends on."""
    # Not the root: files are known by their full paths, and a job's working folder is another each time.
    data = config.data.model_dump(mode="json", exclude={"root", "prepared"})
    answers = {"answer_tokens": config.train.learned_tokens} if config.data.asks else {}
    return {"data": data, "seed": config.seed, **answers}


def origins(readers: dict[str, Reader[Any]], files: dict[str, list[Path]]) -> dict[str, dict[str, Any]]:
    """Where each source's data came from: the hub id, or the local files by path and size."""
    described: dict[str, dict[str, Any]] = {}
    for name, reader in readers.items():
        source_files = list(dict.fromkeys(files[name]))
        sizes = [{"path": str(file), "bytes": file.stat().st_size} for file in source_files[:LISTED_FILES]]
        described[name] = {
            "kind": reader.source.kind,
            "from": "local files" if source_files else f"hub {reader.source.path}",
            "num_files": len(source_files),
            "bytes": sum(file.stat().st_size for file in source_files),
            "files": sizes,
            **reader.origin(),
        }
    return described


def plan_prompts(data: Data, readers: dict[str, Reader[Any]], parts: list[Part]) -> list[PromptTask]:
    """The files of prompts to write: test at every context, validation at the first.

    The validation prompts are shared among the sources of continued text, or, without those, among all.

    Raises:
        BadData: if two files would have one name.
    """

    def task(reader: Reader[Any], split: Split, context: Context, count: int) -> PromptTask:
        own_parts = tuple(p for p in parts if p.split == split and p.source == reader.source.name)
        return PromptTask(reader, split, context, count, data.max_new_tokens, own_parts)

    validating = [r for r in readers.values() if "validation" in r.source.use]
    validating = [r for r in validating if r.continues_text] or validating
    tasks = []
    for k, reader in enumerate(validating):
        count = (data.validation_prompts + len(validating) - 1 - k) // len(validating)
        if count:
            tasks.append(task(reader, "validation", data.contexts[0], count))
    for reader in readers.values():
        if "test" in reader.source.use:
            tasks += [task(reader, "test", context, data.prompts) for context in data.contexts]
    twice = [name for name, number in Counter(t.file for t in tasks).items() if number > 1]
    if twice:
        raise BadData(f"two sources and contexts share the file name {twice[0]!r}: rename one of them")
    return tasks


def plan_asked(
    config: Config, readers: dict[str, Reader[Any]], parts: list[Part], dropped: Dropped
) -> list[PromptTask]:
    """The files of training prompts to write, which the target will answer: a source, a length."""
    answer = config.train.learned_tokens
    return [
        PromptTask(
            reader,
            "train",
            context,
            min(count, config.data.max_sequences),
            answer,
            tuple(part for part in parts if part.source == reader.source.name),
            dropped,
        )
        for reader in readers.values()
        if reader.answered and "train" in reader.source.use
        for context, count in reader.training_contexts(config.data.sequence_tokens - answer)
    ]


def write_prompts(folder: Path, task: PromptTask) -> PromptSummary:
    """Write one file of prompts; one that is there is not made again."""
    summary_file = folder / task.folder / f"{task.file}.summary.json"
    if summary_file.exists():
        return PromptSummary.model_validate_json(summary_file.read_text(encoding="utf-8"))
    request = Request(
        dataset=task.reader.source.name,
        split=task.split,
        context=task.context,
        count=task.count,
        per_document=task.reader.per_document,
        max_new_tokens=task.max_new_tokens,
        seed=task.reader.seed,
        tokenizer=read_tokenizer(folder / TOKENIZER),
    )
    documents = distinct(read_parts(folder / DOCUMENTS, task.parts, task.dropped), request.skipped)
    prompts = task.reader.prompts(documents, request)
    write_rows(folder / task.folder / task.file, prompts)
    summary = PromptSummary(
        file=task.file,
        num_prompts=len(prompts),
        num_documents=len({prompt.document_id for prompt in prompts}),
        skipped=dict(sorted(request.skipped.items())),
    )
    write_text(summary_file, summary.model_dump_json() + "\n")
    return summary


def check_prompts(tasks: list[PromptTask], made: dict[str, PromptSummary]) -> None:
    """Warn of files without prompts.

    Raises:
        BadData: if a split has no prompt at all; says why.
    """
    for split in dict.fromkeys(task.split for task in tasks):
        own = [made[task.file] for task in tasks if task.split == split]
        empty = [f"{s.file}: {s.skipped or 'no documents'}" for s in own if s.num_prompts == 0]
        if len(empty) == len(own):
            raise BadData(
                f"no {split} prompt could be made ({'; '.join(empty)}): add documents, shorten the contexts, "
                "or give the split a larger share"
            )
        for line in empty:
            log.warning("no prompts in %s", line)
