"""Training sequences from pieces of documents."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.documents import DocumentNote, Part
from pipeline.data.packing import encode_part, pack, plan_packing, share_evenly
from pipeline.data.tokenizer import encode
from pipeline.store.files import write_rows
from tests.helpers.documents import document


@pytest.mark.parametrize("most", [0, 1, 3, 4, 7, 12, 16, 17, 99])
def test_shares_are_level_and_exact(most):
    counts = [1, 0, 9, 2, 5]
    takes = share_evenly(counts, most)
    assert sum(takes) == min(most, sum(counts))
    assert all(0 <= take <= count for take, count in zip(takes, counts, strict=True))
    # Level: whoever was cut has at most one piece less than the largest.
    assert all(t == c or t >= max(takes) - 1 for t, c in zip(takes, counts, strict=True))


def test_sequences_start_with_bos_and_never_cross_documents(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    documents = [document(1), document(2, 1), document(3), document(4)]
    write_rows(tmp_path / "documents" / "a.jsonl", documents)
    notes = [DocumentNote(document_id=d.document_id, digest="") for d in documents]
    part = Part(file="a.jsonl", source="s", split="train", documents=notes)
    encoded = encode_part(tmp_path, 50, (part, {"d4"}))
    assert encoded.documents == ["d1", "d3"] and encoded.num_too_short == 1
    (plan,) = plan_packing([encoded], 10**9)
    assert pack(tmp_path, plan) == sum(encoded.counts)
    sequences = np.load(tmp_path / "sequences" / "train-00000.npy")
    expected = []
    for d in (documents[0], documents[2]):
        tokens = encode(tokenizer, d.text)
        expected += [[tokenizer.bos_token_id, *tokens[i : i + 49]] for i in range(0, len(tokens) - 48, 49)]
    assert sequences.dtype == np.uint16 and sequences.tolist() == expected


def test_a_cap_takes_pieces_from_all_of_a_document(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_rows(tmp_path / "documents" / "a.jsonl", [document(1)])
    part = Part(file="a.jsonl", source="s", split="train", documents=[])
    encoded = encode_part(tmp_path, 50, (part, set()))
    (plan,) = plan_packing([encoded], 2)
    pack(tmp_path, plan)
    tokens = encode(tokenizer, document(1).text)
    half = encoded.counts[0] // 2
    sequences = np.load(tmp_path / "sequences" / "train-00000.npy")
    assert sequences[:, 1:].tolist() == [tokens[:49], tokens[half * 49 : half * 49 + 49]]
