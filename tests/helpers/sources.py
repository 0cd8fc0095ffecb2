"""Readers of small sources, and all that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.config.data import AnySource, Data
from pipeline.data.documents import Document, Reader
from pipeline.data.reading import BadRow
from pipeline.data.sources.registry import make_readers


def data_of(root: Path, *sources: dict[str, Any], **fields: Any) -> Data:
    groups = [TypeAdapter(AnySource).validate_python(source) for source in sources]
    contexts = [{"name": "64", "tokens": 64}, {"name": "128", "tokens": 128}]
    return Data.model_validate(
        {"root": str(root), "sources": groups, "sequence_tokens": 64, "contexts": contexts,
         "validation_prompts": 0, **fields}
    )  # fmt: skip


def reader_of(root: Path, **source: Any) -> Reader[Any]:
    return make_readers(data_of(root, {"name": "s", **source}), 0)["s"]


def read(reader: Reader[Any]) -> tuple[list[Document], list[BadRow]]:
    rows = [row for shard in reader.shards() for row in reader.documents(shard)]
    return [r for r in rows if isinstance(r, Document)], [r for r in rows if isinstance(r, BadRow)]
