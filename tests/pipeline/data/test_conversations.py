"""Conversations: which row is which, what of it is asked, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import Context
from pipeline.data.documents import Document, Request
from pipeline.data.reading import BadRow
from pipeline.errors import BadData
from tests.helpers.documents import story, write_lines
from tests.helpers.sources import read, reader_of

TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<s>{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %} calls {{ call.function.name }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "id": "1", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


@pytest.fixture(scope="module")
def chat(chat_tokenizer: Callable[[str], Any]) -> Any:
    return chat_tokenizer(TEMPLATE)


def say(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def shared(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def rows(root: Path, *given: Any, name: str = "c.jsonl") -> tuple[list[Document], list[BadRow]]:
    write_lines(root / name, list(given))
    return read(reader_of(root, kind="conversations", files=[name], use=["test"]))


def rendered(root: Path, chat: Any, *given: dict[str, Any]) -> list[str]:
    write_lines(root / "c.jsonl", list(given))
    reader = reader_of(root, kind="conversations", files=["c.jsonl"], use=["test"])
    documents, bad = read(reader)
    assert not bad
    long = Context(name="400", tokens=400)
    reader.data = reader.data.model_copy(update={"contexts": (long,)})
    return [
        chat.decode(p.tokens) for p in reader.prompts(documents, Request("s", "test", long, 9, 1, 8, 0, chat))
    ]


def test_the_last_answer_is_left_for_the_target_to_give(root: Path, chat: Any) -> None:
    turns = [
        say("system", "be kind"),
        say("user", "one river " * 9),
        say("assistant", "two"),
        say("user", "three"),
    ]
    expected = "<s>system: be kind</s><s>user: " + "one river " * 9 + "</s><s>assistant: two</s>"
    expected += "<s>user: three</s><s>assistant: "
    answered = {"messages": [*turns, say("assistant", "four")]}
    assert rendered(root, chat, answered) == [expected]
    assert rendered(root, chat, {"messages": turns}) == [expected]


def test_sharegpt_rows_are_the_same_conversations(root: Path, chat: Any) -> None:
    row = {"id": 7, "conversations": [
        shared("system", "be kind"), shared("human", "one lamp " * 9), shared("gpt", "two"),
        shared("user", "three"), shared("assistant", "four"),
    ]}  # fmt: skip
    (text,) = rendered(root, chat, row)
    assert text.startswith("<s>system: be kind</s><s>user: one lamp ")
    assert text.endswith("</s><s>assistant: two</s><s>user: three</s><s>assistant: ")


def test_tools_and_calls_reach_the_template(root: Path, chat: Any) -> None:
    called = say("assistant", None, tool_calls=[CALL])
    row = {"tools": TOOLS, "messages": [
        say("user", "what time is it?"), called,
        say("tool", "noon"), say("assistant", "it is noon"),
    ]}  # fmt: skip
    (text,) = rendered(root, chat, row)
    assert (
        text.startswith(json.dumps(TOOLS)[:20]) and " calls clock</s><s>tool: noon</s><s>assistant: " in text
    )


def test_parts_of_a_message_become_one_text(root: Path, chat: Any) -> None:
    parts = [{"type": "text", "text": "one stone, "}, {"type": "text", "text": "two lamps " * 4}]
    (text,) = rendered(root, chat, {"messages": [say("user", parts)]})
    assert "<s>user: one stone, two lamps two" in text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "either a non-empty"),
        ({"text": "hm"}, "either a non-empty"),
        ({"messages": [say("user", "a")], "conversations": [shared("human", "a")]}, "either a non-empty"),
        ({"conversations": [shared("narrator", "a")]}, r"conversations.0: .from. is .narrator."),
        ({"conversations": [{"value": "a"}]}, "`from` is null"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "`from` is"),
        ({"conversations": [{"from": "human"}]}, "conversations.0.value"),
        ({"messages": [say("user", "a")], "functions": [{}]}, "`functions`"),
        ({"messages": [say("user", [{"type": "image"}])]}, "no text"),
        ({"messages": [say("assistant", "hello")]}, "nothing is asked"),
        ({"conversations": [shared("gpt", "hello")]}, "nothing is asked"),
        ({"messages": [say("user", "   ")]}, "empty"),
        ({"messages": [say("user", "\ud800 river")]}, "bad UTF-8"),
    ],
)
def test_a_row_that_cannot_be_a_conversation_is_named(root: Path, row: Any, words: str) -> None:
    documents, (bad,) = rows(root, row)
    assert documents == [] and bad.where.endswith("c.jsonl:1")
    assert re.search(words, f"{bad.reason} {bad.detail}"), bad


def test_a_file_of_another_kind_is_named(root: Path) -> None:
    (root / "c.txt").write_text("hello")
    _, (bad,) = read(reader_of(root, kind="conversations", files=["c.txt"], use=["test"]))
    assert bad.reason == "no conversations"


def test_splits_are_drawn_by_conversation_and_lists_are_read(root: Path) -> None:
    given = [{"messages": [say("user", story(number, 3))]} for number in range(60)]
    (root / "c.json").write_text(json.dumps(given))
    documents, bad = read(reader_of(root, kind="conversations", files=["c.json"], test_fraction=0.4))
    splits = [document.split for document in documents]
    assert not bad and len(documents) == 60
    assert 12 <= splits.count("test") <= 36 and splits.count("train") >= 15
    again, _ = read(reader_of(root, kind="conversations", files=["c.json"], test_fraction=0.4))
    assert [document.split for document in again] == splits


def test_training_prompts_keep_their_length_up_to_what_the_sequence_leaves(root: Path, chat: Any) -> None:
    given = [{"messages": [say("user", "river " * count)]} for count in (2, 20, 60, 200)]
    write_lines(root / "c.jsonl", given)
    reader = reader_of(root, kind="conversations", files=["c.jsonl"], use=["train", "test"], test_fraction=0)
    ((context, count),) = reader.training_contexts(90)
    request = Request("s", "train", context, count, 1, 12, 0, chat)
    lengths = [len(prompt.tokens) for prompt in reader.prompts(read(reader)[0], request)]
    assert 2 <= len(lengths) <= 3 and lengths == sorted(lengths) and 16 <= lengths[0] <= lengths[-1] <= 90
    assert request.skipped["prompt longer than every context"] == 1
    assert len(lengths) + request.skipped.total() == 4


def test_they_need_a_chat_template(root: Path, tokenizer: Any) -> None:
    write_lines(root / "c.jsonl", [{"messages": [say("user", "one stone")]}])
    reader = reader_of(root, kind="conversations", files=["c.jsonl"], use=["test"])
    with pytest.raises(BadData, match="no chat template"):
        reader.prompts(
            read(reader)[0], Request("s", "test", Context(name="c", tokens=64), 1, 1, 8, 0, tokenizer)
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path
