"""The user's own prompts: which row is which, chats as transformers renders them, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pipeline.data.documents import Document, distinct
from pipeline.data.reading import BadRow
from pipeline.data.sources.chats import NOT_TAKEN
from pipeline.data.sources.registry import make_readers
from pipeline.errors import BadData
from tests.helpers.documents import request_for, write_lines
from tests.helpers.sources import data_of, read, reader_of

LENGTH = 2048
# Everything that a message holds, and all that a template may ask of it.
ALL = (
    "<s>{{ tools | tojson }}{% for m in messages %}[{{ m | tojson }}"
    "{{ ' none' if m.content is none else ' absent' if m.content is not defined else ' ' + m.content }}"
    "{% for call in m.tool_calls or [] %} calls {{ call.function.name }}{% endfor %}]</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Gemma's and Llama 4's take content: a text, or parts.
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}</s>{% endfor %}"
)
PLAIN = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"  # as SmolLM2's
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "1", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    """A tokenizer to which the special tokens in a text are meant; tests set its template."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, split_special_tokens=False)


def asked(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": list(messages), **fields}


def say(content: Any, role: str = "user", **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def read_rows(root: Path, *rows: dict[str, Any], **source: Any) -> tuple[list[Document], list[BadRow]]:
    write_lines(root / "p.jsonl", list(rows))
    return read(reader_of(root, kind="prompts", files=["p.jsonl"], **source))


def rendered(root: Path, tokenizer: Any, *rows: dict[str, Any]) -> list[list[int]]:
    """The tokens of every row that is read as a chat; none is bad."""
    write_lines(root / "p.jsonl", list(rows))
    source = {"kind": "prompts", "name": "s", "files": ["p.jsonl"], "chat_template": True}
    reader = make_readers(data_of(root, source, contexts=[{"name": "c", "tokens": LENGTH}]), 0)["s"]
    documents, bad = read(reader)
    assert not bad
    request = request_for(tokenizer, LENGTH, count=len(rows))
    return [prompt.tokens for prompt in reader.prompts(distinct(documents, request.skipped), request)]


# ── which row is which ────────────────────────────────────────────────────────────────────────────


def test_prompts_are_known_by_path_and_line(tmp_path: Path):
    root, elsewhere = tmp_path / "root", tmp_path / "other" / "p.txt"
    for folder in ("a", "b"):
        write_lines(root / folder / "p.jsonl", [{"prompt": f"{folder} {k}"} for k in range(2)])
        (root / folder / "p.json").write_text(json.dumps([{"prompt": f"list {folder}"}, {"prompt": folder}]))
        (root / folder / "p.txt").write_text(f"text {folder}")
    elsewhere.parent.mkdir()
    elsewhere.write_text("another")
    documents, bad = read(reader_of(root, kind="prompts", files=["*/p.*", str(elsewhere)]))
    assert not bad and {d.document_id: d.text for d in documents} == {
        "s/a/p.jsonl:1": "a 0", "s/a/p.jsonl:2": "a 1", "s/b/p.jsonl:1": "b 0", "s/b/p.jsonl:2": "b 1",
        "s/a/p.json:[0]": "list a", "s/a/p.json:[1]": "a", "s/b/p.json:[0]": "list b", "s/b/p.json:[1]": "b",
        "s/a/p.txt": "text a", "s/b/p.txt": "text b", f"s/{elsewhere}": "another",
    }  # fmt: skip


def test_a_list_is_read_by_its_rows_and_other_json_is_named(tmp_path: Path):
    files = {
        "good.json": '[{"prompt": "first"}, 5, {"prompt": ""}, {"x": 1}]',
        "object.json": '{"prompt": "first"}',
        "torn.json": '[{"prompt": "first"}',
        "deep.json": "[" * 100_000,
        "latin.json": '["\xe9"]',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    documents, bad = read(reader_of(tmp_path, kind="prompts", files=["*.json*"]))
    assert [d.text for d in documents] == ["first"]
    assert {b.where.rpartition("/")[2]: b.reason for b in bad} == {
        "good.json:[1]": "not an object", "good.json:[2]": "empty", "good.json:[3]": "wrong type",
        "object.json": "not a list", "torn.json": "not JSON", "deep.json": "not JSON",
        "latin.json": "not JSON", "folder.json": "unreadable", "folder.jsonl": "a directory",
    }  # fmt: skip


def test_tables_and_archives_are_no_prompts(tmp_path: Path):
    names = ["a.parquet", "b.csv", "c.TSV", "d.zip", "e.ndjson", "f.txt.gz"]
    for name in names:
        (tmp_path / name).write_text("prompt\nSay hi\n")
    (tmp_path / "g.md").write_text("Say hi")
    documents, bad = read(reader_of(tmp_path, kind="prompts", files=["*"]))
    assert [d.document_id for d in documents] == ["s/g.md"]
    assert [(b.where.rpartition("/")[2], b.reason) for b in bad] == [
        (name, "no plain text") for name in names
    ]
    assert bad[1].detail == "files of .csv hold fields, or are packed"


# ── chats ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row",
    [
        asked(say("What time is it?"), tools=TOOLS),
        asked(say("Time?"), say(None, "assistant", tool_calls=[CALL]), say("12:00", "tool", id="1")),
        asked(say("Time?"), {"role": "assistant", "tool_calls": [CALL]}, tools=TOOLS),
        asked(say("Time?"), say("", "assistant", tool_calls=[CALL, CALL])),
        asked(say("2 + 2?", name="Ann"), say("4", "assistant", reasoning_content="sum", tool_calls=None)),
        asked({"weight": 0.5, "content": "order of fields", "role": "user", "é": [1, {"b": None, "a": 2}]}),
    ],
    ids=["tools", "null content", "no content", "empty content", "other fields", "order"],
)  # fmt: skip
def test_all_of_a_chat_reaches_the_template(tmp_path: Path, chat: Any, row: dict[str, Any]):
    chat.chat_template = ALL
    expected = chat.apply_chat_template(
        row["messages"], tools=row.get("tools"), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert rendered(tmp_path, chat, row) == [expected]
    assert len(expected) > 20


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (asked(say("What time is it?"), tools=TOOLS), "tools"),
        (asked(say("Time?"), say("", "assistant", tool_calls=[CALL]), say("12:00", "tool")), "tool_calls"),
    ],
)
def test_a_template_that_leaves_out_a_part_is_refused_by_row_and_field(
    tmp_path: Path, chat: Any, row: dict[str, Any], field: str
):
    chat.chat_template = PLAIN
    with pytest.raises(BadData, match=rf"leaves out `{field}` of .*p\.jsonl:1: take the field out"):
        rendered(tmp_path, chat, row)
    del row[field if field == "tools" else "messages"]
    row.setdefault("messages", [say("Time?"), say("", "assistant", tool_calls=None)])
    assert rendered(tmp_path, chat, row), "empty fields are no parts"


def test_parts_of_content_are_one_text(tmp_path: Path, chat: Any):
    """To templates that take parts it is what transformers makes of them; to others, the text."""
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi", "cache_control": {}}]
    chat.chat_template = PARTS
    expected = chat.apply_chat_template([say(parts), say("b")], tokenize=True, return_dict=False)
    assert rendered(tmp_path, chat, asked(say(parts), say("b"))) == [expected]
    chat.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (tokens,) = rendered(tmp_path, chat, asked(say(parts), say("b")))
    assert chat.decode(tokens) == "Say hi</s>b</s>"


@pytest.mark.parametrize("field", NOT_TAKEN)
def test_fields_that_reach_no_template_are_refused(tmp_path: Path, field: str):
    full, empty = (asked(say("hi"), **{field: value}) for value in (["x"], []))
    documents, (bad,) = read_rows(tmp_path, full, empty, chat_template=True)
    assert bad.where.endswith("p.jsonl:1") and bad.detail.startswith(f"`{field}` reaches no chat template")
    assert [d.document_id for d in documents] == ["s/p.jsonl:2"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (asked(say([{"type": "image_url", "image_url": {"url": "x"}}])), "messages.0.content: .*image_url"),
        (asked(say([{"type": "text"}])), "messages.0.content: .*no text"),
        (asked(say(["hi"])), "messages.0.content: .*no text"),
        (asked(say("hi"), say(None, "assistant")), "messages.1: a message needs `content` or `tool_calls`"),
        (asked(say("hi"), tools={"name": "clock"}), "tools: .*list"),
        ({"prompt": "hi", "tools": TOOLS}, "`tools` go with `messages`"),
        ({"prompt": "hi", "messages": [say("hi")]}, "a row needs either"),
        (asked(say("hi"), tools=[{"name": "\ud800"}]), "lone surrogate"),
        (asked(say("hi", thinking="\ud800")), "lone surrogate"),
        (asked(say(None, "assistant", tool_calls=[CALL])), "^$"),
    ],
    ids=["image", "no text", "no parts", "silent", "no list", "prompt with tools", "both", "tools' letters",
         "letters", "empty"],
)  # fmt: skip
def test_bad_chats_are_told_by_their_field(tmp_path: Path, row: dict[str, Any], words: str):
    documents, (bad,) = read_rows(tmp_path, asked(say("hello")), row, chat_template=True)
    assert len(documents) == 1 and bad.where.endswith("p.jsonl:2")
    assert re.search(words, bad.detail)


def test_prompts_may_have_an_empty_list_of_messages_beside_them(tmp_path: Path):
    documents, bad = read_rows(tmp_path, {"prompt": "\ufeffhi", "messages": []})
    assert not bad and (documents[0].text, documents[0].messages) == ("hi", None)
    (document,), _ = read_rows(tmp_path, {"prompt": "\ufeffhi", "messages": []}, chat_template=True)
    assert document.messages == [say("hi")]


def test_a_row_that_the_template_refuses_is_named_with_its_words(tmp_path: Path, chat: Any):
    """Also where an earlier row says the same in another role, and so gives the document its id."""
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here,\n please') }}"
        "{% endif %}{{ m.content }}</s>{% endfor %}"
    )
    said = (
        r"s': the tokenizer's chat template refuses \S+/p\.jsonl:2: no system here, please\. Change this row"
    )
    with pytest.raises(BadData, match=said):
        rendered(tmp_path, chat, asked(say("Be brief.")), asked(say("Be brief.", "system")))
    chat.chat_template = (
        "{% for m in messages %}{{ m.content + 'x' * 9000 }}{{ m.content.missing.field }}{% endfor %}"
    )
    with pytest.raises(BadData, match=r"refuses \S+/p\.jsonl:1: .*missing") as caught:
        rendered(tmp_path, chat, asked(say("hi")))
    assert len(str(caught.value)) < 600
