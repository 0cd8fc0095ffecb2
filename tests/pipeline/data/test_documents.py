"""A document is its text: copies, several questions about one text, and what is counted by document."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.documents import BYTE_ORDER_MARK, Document, distinct, find_copies, read_shard
from pipeline.data.prepare import plan_prompts, write_prompts
from pipeline.data.sources.registry import make_readers
from pipeline.intervals import bootstrap_interval
from pipeline.store.files import read_rows
from pipeline.store.rows import Prompt
from tests.helpers.documents import bench, story, write_lines
from tests.helpers.sources import data_of, read, reader_of


def numbered(number: int, text: str, **fields: Any) -> Document:
    return Document(document_id=f"s/{number}", source="s", split="test", text=text, **fields)


def kept(*documents: Document) -> tuple[list[Document], int]:
    """The distinct ones of some documents, and the number of copies."""
    skipped: Counter[str] = Counter()
    found = list(distinct(documents, skipped))
    assert set(skipped) <= {"copy of an earlier document"}
    return found, skipped.total()


def test_questions_about_one_text_share_its_id_and_the_same_question_is_a_copy():
    asked = [("a", "Who?"), ("b", "Who?"), ("a", "Why?"), ("a", "Who?"), ("b", "When?")]
    found, copies = kept(*(numbered(k, text, after=after) for k, (text, after) in enumerate(asked)))
    assert [(d.document_id, d.text, d.after) for d in found] == [
        ("s/0", "a", "Who?"), ("s/1", "b", "Who?"), ("s/0", "a", "Why?"), ("s/1", "b", "When?"),
    ]  # fmt: skip
    assert copies == 1


def test_chats_of_the_same_words_are_copies_only_with_the_same_roles_and_tools():
    user, system = [{"role": "user", "content": "hi"}], [{"role": "system", "content": "hi"}]
    chats = [(user, None), (system, None), (user, [{"name": "clock"}]), (user, None)]
    given = [numbered(k, "hi", messages=m, tools=t) for k, (m, t) in enumerate(chats)]
    found, copies = kept(*given)
    assert [(d.messages, d.tools) for d in found] == chats[:3] and copies == 1
    assert {d.document_id for d in found} == {"s/0"}


def test_a_byte_order_mark_is_no_text_and_does_not_hide_a_copy(tmp_path: Path):
    marked = numbered(1, BYTE_ORDER_MARK * 2 + "text")
    assert marked.text == "text"
    assert Document.model_validate_json(marked.model_dump_json()) == marked
    assert kept(numbered(0, "text"), marked)[1] == 1
    (tmp_path / "a.txt").write_text(story(1), encoding="utf-8")
    (tmp_path / "b.txt").write_text(story(1), encoding="utf-8-sig")
    write_lines(tmp_path / "c.jsonl", [{"text": BYTE_ORDER_MARK + story(1)}])
    reader = reader_of(tmp_path, kind="text", files=["*.txt", "*.jsonl"])
    documents, _ = read(reader)
    assert len(documents) == 3 and len({(d.text, d.split) for d in documents}) == 1
    (shard,) = reader.shards()
    (part,) = read_shard(tmp_path / "documents", (reader, shard)).parts
    assert len(find_copies([part])[part.file]) == 2


@pytest.fixture
def prompts(tmp_path: Path, tokenizer) -> tuple[list[Prompt], int]:
    """Prompts from three questions about each of four meetings, meeting by meeting; how many documents."""
    rows = [bench(k // 3, f"Question {k}?") | {"_id": f"q{k}"} for k in range(12)]
    write_lines(tmp_path / "bench" / "qmsum.jsonl", rows)
    data = data_of(tmp_path, {"kind": "longbench", "name": "s", "task": "qmsum", "path": "bench"}, prompts=12)
    readers = make_readers(data, 0)
    (shard,) = readers["s"].shards()
    parts = read_shard(tmp_path / "documents", (readers["s"], shard)).parts
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    task = plan_prompts(data, readers, parts)[1]
    summary = write_prompts(tmp_path, task)
    return read_rows(tmp_path / "prompts" / task.file, Prompt), summary.num_documents


def test_questions_of_one_meeting_count_as_one_document(prompts):
    made, num_documents = prompts
    assert len(made) == 12 and num_documents == 4
    assert {p.document_id for p in made} == {f"s/q{k}" for k in (0, 3, 6, 9)}


def test_the_first_prompts_are_of_all_meetings(prompts):
    """A cell that times the first four prompts sees four documents."""
    ids = [prompt.document_id for prompt in prompts[0]]
    assert ids == ["s/q0", "s/q3", "s/q6", "s/q9"] * 3


def test_intervals_resample_meetings(prompts):
    """Rows of questions, pooled by document, are as sure as one row for each meeting."""
    ids = [prompt.document_id for prompt in prompts[0]]
    accepted = np.random.default_rng(0).integers(0, 20, len(ids))
    seeded: dict[str, Any] = {"samples": 200, "seed": 1}
    by_question = bootstrap_interval(accepted, [20] * 12, clusters=ids, **seeded)
    meetings = [
        sum(n for n, name in zip(accepted, ids, strict=True) if name == one) for one in sorted(set(ids))
    ]
    assert by_question == bootstrap_interval(meetings, [60] * 4, **seeded)
    assert by_question != bootstrap_interval(accepted, [20] * 12, **seeded)
