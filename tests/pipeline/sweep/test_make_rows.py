"""Which rows lie within what a drafter was trained on."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.axes import FULL, View
from pipeline.store.rows import Prompt
from pipeline.sweep.grid import Drafter
from pipeline.sweep.make_rows import in_trained_range

TRAINED, SERVED, LENGTH, NEW = 200, 800, 700, 50
PROMPT = Prompt(
    prompt_id="p", document_id="d", dataset="x", context="700", split="test", tokens=[3] * LENGTH,
    max_new_tokens=NEW,
)  # fmt: skip
REBASED = View("chunk_topk", 64, positions="rebased")
WINDOW = View("window", 64, sinks=4)


@pytest.mark.parametrize(
    ("kind", "view", "served", "inside"),
    [
        ("lm", View("streaming", 64), 0, False),
        ("lm", REBASED, 0, False),  # it reads the prompt with true attention, as far as that is long
        ("first_layers", REBASED, 0, False),
        ("head", REBASED, 0, True),  # 64 and 50 new ones
        ("head", View("chunk_topk", 64), 0, False),
        ("head", FULL, 0, False),
        ("head", View("chunk_topk", 160, positions="rebased"), 0, False),
        ("head", WINDOW, SERVED, True),
        ("head", View("streaming", 64), SERVED, True),
        ("head", WINDOW, LENGTH + NEW - 1, False),
        ("head", View("chunk_topk", 64), SERVED, False),  # what lies in between was never at such a distance
        ("head", FULL, SERVED, False),
        ("lm", WINDOW, SERVED, False),
    ],
)
def test_what_is_moved_counts_where_nothing_else_is_attended_to(
    kind: Any, view: View, served: int, inside: bool
) -> None:
    drafter = Drafter("d", None, TRAINED, trained_kind=kind, served_positions=served)
    assert in_trained_range(drafter, view, PROMPT) == inside
    short = PROMPT.model_copy(update={"tokens": [3] * (TRAINED - NEW)})
    assert in_trained_range(drafter, view, short), "as long as those of training"
