"""Training documents that occur in the evaluation data are found."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest

from pipeline.data.decontaminate import find_contaminated, index_evaluation, shingles
from pipeline.data.documents import Document, DocumentNote, Part, digest
from pipeline.store.files import write_rows
from tests.helpers.documents import story


def part(folder, split, texts):
    documents = [
        Document(document_id=f"{split}{k}", source="s", split=split, text=text)
        for k, text in enumerate(texts)
    ]
    write_rows(folder / f"{split}.jsonl", documents)
    notes = [DocumentNote(document_id=d.document_id, digest=digest(d.text)) for d in documents]
    return Part(file=f"{split}.jsonl", source="s", split=split, documents=notes)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text, True),
        (lambda text: textwrap.fill(text.upper(), 31).replace(".", " ;"), True),
        (lambda text: text[: len(text) // 2], True),
        (lambda text: story(50, 300) + text + story(51, 300), True),
        (lambda text: story(52) + text[:300], False),
        (lambda text: story(53), False),
    ],
    ids=["copy", "rewrapped", "half", "collection", "quotation", "unrelated"],
)
def test_contaminated_documents_are_found(tmp_path, change, found):
    index_evaluation(tmp_path, [part(tmp_path, "test", [story(1), story(2)])])
    result = find_contaminated(tmp_path, part(tmp_path, "train", [change(story(2)), story(99)]))
    assert result.dropped == ({"train0": "test1"} if found else {})


def test_a_short_header_in_the_evaluation_data_does_not_empty_the_training_split(tmp_path):
    header = story(7, 2)
    index_evaluation(tmp_path, [part(tmp_path, "test", [header])])
    training = [header + story(k) for k in range(10, 20)] + [header]
    result = find_contaminated(tmp_path, part(tmp_path, "train", training))
    assert set(result.dropped) == {"train10"}


def test_without_evaluation_documents_nothing_is_dropped(tmp_path):
    index_evaluation(tmp_path, [])
    assert find_contaminated(tmp_path, part(tmp_path, "train", [story(1), "—"])).dropped == {}


def test_about_one_run_in_four_is_kept_and_order_matters():
    words = [f"w{k}" for k in range(4007)]
    assert 900 < len(shingles(" ".join(words))) < 1100
    assert not np.intersect1d(shingles(" ".join(words)), shingles(" ".join(reversed(words)))).size
