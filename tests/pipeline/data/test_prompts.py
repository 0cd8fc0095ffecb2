"""Evaluation prompts of exact lengths."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.prompts import (
    continuation_prompts,
    insert,
    needle_prompts,
    places,
    split_template,
    template_prompts,
)
from pipeline.data.sources.lwm import NEEDLE, RETRIEVAL
from pipeline.data.tokenizer import encode
from pipeline.errors import BadData
from tests.helpers.documents import document, request_for


@pytest.mark.parametrize("num_tokens", [0, 9, 10, 19, 35, 100, 1001])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_places_lie_inside_and_do_not_overlap(num_tokens, most):
    starts = places(num_tokens, 10, most)
    assert len(starts) == min(most, num_tokens // 10)
    covered = [t for s in starts for t in range(s, s + 10)]
    assert covered == sorted(set(covered)) and all(0 <= t < num_tokens for t in covered)


def test_continuations_are_exact_pieces_and_take_turns(tokenizer):
    documents = [document(1), document(2, 10), document(3)]
    request = request_for(tokenizer, 64, count=3)
    prompts = continuation_prompts(iter(documents), request)
    assert [p.document_id for p in prompts] == ["d1", "d2", "d3"]
    prompts = continuation_prompts(iter(documents), request_for(tokenizer, 64, count=9, per_document=3))
    assert [p.document_id for p in prompts][:4] == ["d1", "d2", "d3", "d1"]
    assert [p.document_id for p in prompts].count("d1") == 3
    for p in prompts:
        text = next(d.text for d in documents if d.document_id == p.document_id)
        assert len(p.tokens) == 64 and p.tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(p.tokens[1:]) in text
    assert len({tuple(p.tokens) for p in prompts}) == len(prompts)


def test_a_document_that_is_too_short_is_counted(tokenizer):
    request = request_for(tokenizer, 64)
    assert continuation_prompts([document(1, 1)], request) == []
    assert request.skipped == {"document shorter than the context": 1}


@pytest.mark.parametrize("tokens", [48, 64, 101])
@pytest.mark.parametrize("cut", ["text end", "middle", "end"])
def test_templated_prompts_have_the_exact_length_and_keep_the_question(tokenizer, tokens, cut):
    whole = document(4, before="Read this.\n\n", after="\n\nWhich lamp? Answer: ", answers=["x"])
    (prompt,) = template_prompts([whole], request_for(tokenizer, tokens), cut)
    assert len(prompt.tokens) == tokens and prompt.answers == ["x"]
    text = tokenizer.decode(prompt.tokens[1:])
    full = whole.before + whole.text + whole.after
    if cut == "text end":
        body = text.removeprefix(whole.before).removesuffix(whole.after)
        assert text == whole.before + body + whole.after and body in whole.text
    elif cut == "middle":
        ids, half = encode(tokenizer, full), (tokens - 1) // 2
        assert prompt.tokens[1:] == ids[:half] + ids[-(tokens - 1 - half) :]
        assert text.startswith(whole.before) and text.endswith(whole.after)
    else:
        assert full.startswith(text)


def test_a_question_that_would_be_cut_is_counted_instead(tokenizer):
    whole = document(4, before="Read this. ", after="Which? " * 30)
    request = request_for(tokenizer, 64)
    for cut in ("middle", "text end"):
        assert template_prompts([whole], request, cut) == []
    assert request.skipped == {"question or instruction longer than its share of the context": 2}


def test_templates_are_split_at_their_hole():
    assert split_template("a {{x}} {context} b {input}", "context", {"input": "q {y}"}, "t") == (
        "a {x} ", " b q {y}",
    )  # fmt: skip
    for wrong, message in (("{input}", "exactly once"), ("{context}{z}", r"\{z\}"), ("{context", "broken")):
        with pytest.raises(BadData, match=message):
            split_template(wrong, "context", {"input": ""}, "t")


@pytest.mark.parametrize("num_needles", [1, 3])
def test_needles_are_in_the_text_at_sentence_ends_and_swept(tokenizer, num_needles):
    documents = [document(k, 120) for k in range(3)]
    request = request_for(tokenizer, 500, count=5)
    prompts = needle_prompts(iter(documents), request, RETRIEVAL, NEEDLE, num_needles)
    depths = []
    for p in prompts:
        text = tokenizer.decode(p.tokens[1:])
        assert len(p.tokens) == 500 and p.scoring == "contains" and len(set(p.answers)) == num_needles
        for number in p.answers:
            assert len(number) == 7 and text.count(f"number is: {number}\n") == 1
            before = text.split("USER: ", 1)[1].split("\nThe special magic", 1)[0]
            assert before == "" or before.endswith((".", "\n"))
        depths.append(text.index(p.answers[0]))
    assert len(prompts) == 5 and depths == sorted(depths) and depths[-1] > 2 * depths[0]
    again = needle_prompts(iter(documents), request, RETRIEVAL, NEEDLE, num_needles)
    assert again == prompts


def test_insert_moves_back_to_the_last_sentence_end():
    hay = np.array([[10, 11, 12, 13, 14, 15], [0, 1, 0, 0, 1, 0]])
    assert insert(hay, [[7]], [0.5]) == [10, 11, 7, 12, 13, 14, 15]
    assert insert(hay, [[7]], [0.0]) == [7, 10, 11, 12, 13, 14, 15]
    assert insert(hay, [[7], [8]], [0.4, 1.0]) == [10, 11, 7, 12, 13, 14, 8, 15]
