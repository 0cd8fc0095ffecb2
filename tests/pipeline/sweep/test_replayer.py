"""The partner of a prompt, whose KV is the control `other_prompt`."""

from __future__ import annotations

from typing import Any

from pipeline.store.rows import Prompt
from pipeline.sweep.replayer import PromptViews
from tests.helpers.tiny import tiny_prompts

LENGTH = 12
FIRST, SECOND, THIRD = tiny_prompts("test", 3, LENGTH, 4)


def partner(*others: Prompt) -> list[int] | None:
    """The tokens of the first prompt's partner among others of the file."""
    unused: Any = None
    found = PromptViews(unused, [FIRST, *others], []).partner(FIRST)
    return None if found is None else found.tokens


def with_tokens(prompt: Prompt, *tokens: int) -> Prompt:
    return prompt.model_copy(update={"tokens": list(tokens)})


def test_a_prompt_that_begins_with_the_same_tokens_is_passed_over():
    """Two chats of other documents that go on from one beginning: the cut would leave the prompt itself."""
    same, longer = with_tokens(SECOND, *FIRST.tokens), with_tokens(SECOND, *FIRST.tokens, 5, 6)
    assert partner(same, THIRD) == partner(longer, THIRD) == THIRD.tokens
    assert partner(same) is partner(longer) is None
    other = with_tokens(SECOND, *FIRST.tokens[:-1], FIRST.tokens[-1] % 90 + 3, 7)
    assert partner(other) == other.tokens[:LENGTH] != FIRST.tokens


def test_a_prompt_of_the_same_document_or_a_shorter_one_is_passed_over():
    question = SECOND.model_copy(update={"document_id": FIRST.document_id})
    assert partner(question, with_tokens(SECOND, *SECOND.tokens[:-1]), THIRD) == THIRD.tokens
    assert partner(question) is None
