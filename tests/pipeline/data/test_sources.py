"""Every kind of source: its documents, bad rows and prompts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.data.prepare import plan_prompts
from pipeline.data.sources.longbench import MAX_NEW_TOKENS, TEMPLATES
from pipeline.data.sources.registry import make_readers
from pipeline.data.sources.text import expand
from pipeline.errors import BadData
from tests.helpers.documents import bench, book, narrative, request_for, story, write_lines
from tests.helpers.sources import data_of, read, reader_of


def test_text_splits_are_stable_and_follow_the_fractions(tmp_path):
    for k in range(200):
        (tmp_path / f"{k}.txt").write_text(story(k, 2))
    source = {"kind": "text", "files": ["*.txt"], "validation_fraction": 0.2, "test_fraction": 0.3}
    documents, bad = read(reader_of(tmp_path, **source))
    splits = {d.document_id: d.split for d in documents}
    assert not bad and len(splits) == 200
    assert 40 < sum(s == "test" for s in splits.values()) < 80
    assert 25 < sum(s == "validation" for s in splits.values()) < 55
    for k in range(100, 200):
        (tmp_path / f"{k}.txt").unlink()
    fewer, _ = read(reader_of(tmp_path, **source))
    assert {d.document_id: d.split for d in fewer} == {n: s for n, s in splits.items() if int(n[2:-4]) < 100}
    only, _ = read(reader_of(tmp_path, **source, use=["test"]))
    assert {d.split for d in only} == {"test"}


def test_bad_text_files_are_named(tmp_path):
    (tmp_path / "good.txt").write_text(story(1))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("a word")
    (tmp_path / "latin.txt").write_bytes("naïve text of some length".encode("latin-1"))
    (tmp_path / "folder.txt").mkdir()
    documents, bad = read(reader_of(tmp_path, kind="text", files=["*.txt"], use=["test"]))
    assert [d.document_id for d in documents] == ["s/good.txt"]
    assert {b.where.rsplit("/", 1)[1]: b.reason for b in bad} == {
        "empty.txt": "empty", "short.txt": "too short", "latin.txt": "bad UTF-8", "folder.txt": "a directory",
    }  # fmt: skip
    for files, message in (
        (["folder.txt"], "is a directory"),
        (["no.txt"], "does not exist"),
        (["*.md"], "no file"),
    ):
        with pytest.raises(BadData, match=message):
            reader_of(tmp_path, kind="text", files=files, use=["test"]).shards()


def test_the_standard_library_is_the_library_itself(tmp_path):
    files = expand("stdlib", tmp_path)
    names = {file.name for file in files}
    assert {"argparse.py", "sysconfig.py"} <= names and "test_argparse.py" not in names
    assert not any(part in ("tests", "site-packages") for file in files for part in file.parts[-3:])


def test_pg19_rows_are_checked(tmp_path):
    rows = [
        book(1),
        book(2, text=None),
        {"url": "u"},
        book(3, text=7),
        book(4, text=""),
        book(5, text="\ud800" * 20),
    ]
    write_lines(tmp_path / "books" / "test.jsonl.gz", rows)
    documents, bad = read(reader_of(tmp_path, kind="pg19", path="books", use=["test"]))
    assert [d.text for d in documents] == [story(1)]
    assert [b.reason for b in bad] == ["wrong type", "missing field", "wrong type", "empty", "bad UTF-8"]
    assert bad[1].where.endswith("test.jsonl.gz:3") and bad[1].detail.startswith("text")


def test_longbench_wording_is_ours_or_the_published_files(tmp_path):
    write_lines(tmp_path / "bench" / "qmsum.jsonl", [bench(1, "Who?"), bench(2, "Why?")])
    source = {"kind": "longbench", "task": "qmsum", "path": "bench"}
    ours = reader_of(tmp_path, **source)
    documents, _ = read(ours)
    assert documents[1].after.endswith("Request: Why?\nResponse, in one or a few sentences: ")
    assert documents[0].max_new_tokens == 512 and ours.origin()["longbench_templates"] == "built-in"
    (tmp_path / "p.json").write_text(json.dumps({"qmsum": "Q {input} C {context} A {input}"}))
    (tmp_path / "l.json").write_text(json.dumps({"qmsum": 5}))
    theirs = reader_of(tmp_path, **source, prompts_file="p.json", max_lengths_file="l.json")
    documents, _ = read(theirs)
    assert (documents[0].before, documents[0].after, documents[0].max_new_tokens) == (
        "Q Who? C ",
        " A Who?",
        5,
    )
    assert theirs.origin()["longbench_templates"] == f"published file {tmp_path / 'p.json'}"
    assert theirs.extra_files() == [tmp_path / "p.json", tmp_path / "l.json"]
    with pytest.raises(BadData, match=r"p\.json has no str for the task 'trec'"):
        reader_of(tmp_path, **{**source, "task": "trec"}, prompts_file="p.json").shards()
    with pytest.raises(BadData, match=r"no trec\.jsonl.*data\.zip.*resolve"):
        reader_of(tmp_path, **{**source, "task": "trec"}).shards()


def test_longbench_rows_that_cannot_be_written_are_bad(tmp_path):
    """Letters that are no UTF-8 in any field that is kept."""
    fields: list[dict[str, Any]] = [{"answers": ["\ud800"]}, {"_id": "\ud800"}, {"input": "\ud800"}]
    write_lines(
        tmp_path / "bench" / "qmsum.jsonl", [bench(k, "Who?") | field for k, field in enumerate(fields)]
    )
    documents, bad = read(reader_of(tmp_path, kind="longbench", task="qmsum", path="bench"))
    assert not documents and [row.reason for row in bad] == ["bad UTF-8"] * 3


def test_longbench_is_read_from_its_zip(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec.jsonl", json.dumps(bench(1, "Type?")) + "\n")
    documents, _ = read(reader_of(tmp_path, kind="longbench", task="trec", path="./data.zip"))
    assert documents[0].text == story(1) and documents[0].after == "\nType?"


def test_every_longbench_task_has_a_template_and_a_length():
    from typing import get_args

    from pipeline.config.data import LongBenchSource

    tasks = set(get_args(LongBenchSource.model_fields["task"].annotation))
    assert len(tasks) == 13 and tasks == set(TEMPLATES) == set(MAX_NEW_TOKENS)


def test_lwm_rows_pick_prompts_and_missing_ones_are_named(tmp_path):
    rows = [narrative(k // 2, f"n{k // 2}") for k in range(8)]  # every story twice, as on the hub
    write_lines(tmp_path / "nqa" / "train.jsonl", rows)
    source = {"kind": "lwm", "path": "nqa"}
    documents, _ = read(reader_of(tmp_path, **source, rows=[2, 6]))
    assert [(d.document_id, d.split) for d in documents] == [("s/n1", "test"), ("s/n3", "test")]
    assert documents[0].before.endswith("[start of the book]\n")
    documents, _ = read(reader_of(tmp_path, **source, rows=[], use=["test", "train"]))
    assert [(d.document_id, d.split) for d in documents] == [
        (f"s/n{k}", split) for split in ("test", "train") for k in range(4)
    ]
    with pytest.raises(BadData, match=r"has 8 rows, so rows \[50, .*the paper's rows.*rows: \[\]"):
        read(reader_of(tmp_path, **source))
    with pytest.raises(BadData, match=r"has no test\.jsonl"):
        reader_of(tmp_path, **source, task="needle").shards()


def test_lwm_reads_parquet_of_both_schemas(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([narrative(1, "a")]), tmp_path / "n.parquet")
    pq.write_table(pa.Table.from_pylist([book(2)]), tmp_path / "b.parquet")
    for name, seed in (("n", 1), ("b", 2)):
        documents, _ = read(reader_of(tmp_path, kind="lwm", task="needle", path=f"./{name}.parquet"))
        assert [d.text for d in documents] == [story(seed)]


def test_user_prompts_keep_their_length_and_find_their_context(tmp_path, tokenizer):
    rows = [{"prompt": "Hi there"}, {"prompt": story(1, 8)}, {"prompt": story(2)}, {"messages": []}, {"x": 1}]
    write_lines(tmp_path / "p.jsonl", rows)
    (tmp_path / "own.txt").write_text("My own prompt")
    reader = reader_of(tmp_path, kind="prompts", files=["p.jsonl", "own.txt"])
    documents, bad = read(reader)
    assert [b.where.rsplit("/", 1)[1] for b in bad] == ["p.jsonl:4", "p.jsonl:5"]
    small, large = request_for(tokenizer, 64), request_for(tokenizer, 128)
    prompts = reader.prompts(documents, small)
    assert sorted(tokenizer.decode(p.tokens[1:]) for p in prompts) == ["Hi there", "My own prompt"]
    (longer,) = reader.prompts(documents, large)
    assert 64 < len(longer.tokens) <= 128 and tokenizer.decode(longer.tokens[1:]) == story(1, 8)
    assert small.skipped == {"prompt longer than every context": 1}


def test_chat_templates_are_the_tokenizers(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]
    write_lines(tmp_path / "p.jsonl", [{"prompt": "Who?"}, {"messages": messages}])
    source = {"kind": "prompts", "files": ["p.jsonl"]}
    assert [b.reason for b in read(reader_of(tmp_path, **source))[1]] == ["messages"]
    reader = reader_of(tmp_path, **source, chat_template=True)
    documents, bad = read(reader)
    assert not bad
    with pytest.raises(BadData, match="no chat template"):
        reader.prompts(documents, request_for(tokenizer, 64))
    tokenizer.save_pretrained(tmp_path / "t")
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(tmp_path / "t", split_special_tokens=False)
    chat.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    first, second = reader.prompts(documents, request_for(chat, 64))
    assert chat.decode(first.tokens) == "<s>[user] Who?</s>[assistant]"
    assert chat.decode(second.tokens) == "<s>[user] Say hi</s>[assistant] hi</s>[assistant]"
    assert first.tokens[0] == chat.bos_token_id and chat.eos_token_id in first.tokens


def test_validation_prefers_continued_text_and_every_context_is_tested(tmp_path):
    text = {"kind": "text", "name": "t", "files": ["*"]}
    lwm = {"kind": "lwm", "name": "l", "use": ["validation", "test"]}
    for sources, names in (
        ((text, lwm), {"t": 5}),
        ((lwm,), {"l": 5}),
        ((text, {**text, "name": "u"}), {"t": 3, "u": 2}),
    ):
        data = data_of(tmp_path, *sources, validation_prompts=5)
        tasks = plan_prompts(data, make_readers(data, 0), [])
        validation = [t for t in tasks if t.split == "validation"]
        assert {t.reader.source.name: t.count for t in validation} == names
        assert {t.context.name for t in validation} == {"64"}
        assert len(tasks) - len(validation) == 2 * len(sources)


def test_splits_that_nothing_feeds_are_named(tmp_path):
    text = {"kind": "text", "name": "t", "files": ["*"], "use": ["train"]}
    with pytest.raises(BadData, match="'test' in its `use`"):
        make_readers(data_of(tmp_path, text), 0)
    with pytest.raises(BadData, match="validation_prompts: 0"):
        make_readers(data_of(tmp_path, {**text, "use": ["test"]}, validation_prompts=1), 0)
