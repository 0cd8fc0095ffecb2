"""Made-up texts, and small sources of every kind in the hub's schemas."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from pipeline.config.data import Context
from pipeline.data.documents import Document, Request

WORDS = """
river stone lamp window garden winter letter captain harbour silver quiet thunder ladder mirror orange
copper meadow travel engine shadow marble candle pepper velvet hollow signal carpet bottle basket forest
"""


def story(seed: int, sentences: int = 60) -> str:
    """Seeded text of made-up sentences; two seeds share hardly a run of words."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS.split(), k=9)).capitalize() + "." for _ in range(sentences)]
    return "\n".join(lines) + "\n"


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def book(seed: int, **changes: Any) -> dict[str, Any]:
    row = {"short_book_title": "A", "publication_date": 1900, "url": "u", "text": story(seed)}
    return {**row, **changes}


def narrative(seed: int, name: str) -> dict[str, Any]:
    summary = {"text": "", "tokens": [], "url": "", "title": ""}
    sizes = {"file_size": 1, "word_count": 1}
    document = {"id": name, "kind": "gutenberg", "url": "", "start": "", "end": "", "text": story(seed)}
    return {
        "document": {**document, **sizes, "summary": summary},
        "question": {"text": "", "tokens": []},
        "answers": [],
    }


def bench(seed: int, question: str) -> dict[str, Any]:
    fixed = {"length": 9, "dataset": "qmsum", "language": "en", "all_classes": None, "_id": f"id{seed}"}
    return {"input": question, "context": story(seed), "answers": ["yes"], **fixed}


def request_for(tokenizer, tokens: int, count: int = 4, per_document: int = 2) -> Request:
    context = Context(name="c", tokens=tokens)
    return Request("set", "test", context, count, per_document, 8, 0, tokenizer)


def document(seed: int, sentences: int = 60, **fields: Any) -> Document:
    text = story(seed, sentences)
    return Document(document_id=f"d{seed}", source="set", split="test", text=text, **fields)


def made_books(root: Path) -> None:
    """Files laid out as `conf/books.yaml` wants them, of made-up text."""
    for split, first, count in (("train", 0, 4), ("validation", 10, 2), ("test", 20, 2)):
        rows = [book(k, text=story(k, 400)) for k in range(first, first + count)]
        write_lines(root / "pg19" / f"{split}.jsonl.gz", rows)
    meetings = [bench(k, f"What of {k}?") | {"context": story(k, 400)} for k in (30, 31)]
    write_lines(root / "longbench" / "qmsum.jsonl.gz", meetings)
    for split, first in (("train", 40), ("validation", 50)):
        rows = [narrative(0, f"n{k}") for k in range(first, first + 2)]
        for k, row in enumerate(rows, first):
            row["document"]["text"] = story(k, 400)
        write_lines(root / "narrativeqa" / f"{split}.jsonl.gz", rows)
