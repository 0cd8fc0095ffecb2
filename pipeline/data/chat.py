"""Prompts in a tokenizer's chat template: a whole chat, or what stands around a text that is asked about.

What tools, system turns and several parts of a message become is the template's business, and what it refuses
is bad data, by row. Templates write special tokens as text, BOS among them, and in prompts they are meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALLS = "tool_calls"  # of a message
MARK = "\ue000\ue001\ue000"  # for private use: in no text and no template


def in_chat(tokenizer: PreTrainedTokenizerBase, asked_for: bool | None, source: str) -> bool:
    """Whether a source's prompts are put into the chat template; by default where there is one.

    Raises:
        BadData: if it is asked for and there is none.
    """
    if asked_for and tokenizer.chat_template is None:
        raise BadData(
            f"source {source!r}: the tokenizer has no chat template, which it needs: use a chat model's "
            "tokenizer, or set chat_template: false where the source has that field"
        )
    return tokenizer.chat_template is not None if asked_for is None else asked_for


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    source: str,
    where: str,
) -> str:
    """A chat as text, up to where the assistant's answer begins.

    Raises:
        BadData: if the template refuses it, or leaves out its tools or its calls of them; names the row.
    """
    text = rendered(tokenizer, messages, tools, source, where)
    calls = any(message.get(CALLS) for message in messages)
    without = [{name: part for name, part in message.items() if name != CALLS} for message in messages]
    for field, there, rest, others in (("tools", tools, messages, None), (CALLS, calls, without, tools)):
        # A template that cannot do without the field does say it.
        if there and same_text(tokenizer, rest, others, text):
            raise BadData(
                f"source {source!r}: the tokenizer's chat template leaves out `{field}` of {where}: take the "
                "field out of the row, or take a model whose template has it"
            )
    return text


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    source: str,
    where: str,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # whatever the template raises for what is in the row
        raise BadData(
            f"source {source!r}: the tokenizer's chat template refuses {where}: "
            f"{' '.join(str(error).split())[:200]}. Change this row, or take it out"
        ) from error


def same_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    text: str,
) -> bool:
    """Whether this chat reads as `text`; one that the template refuses does not."""
    try:
        return rendered(tokenizer, messages, tools, "", "") == text
    except BadData:
        return False


def sides_in_chat(
    tokenizer: PreTrainedTokenizerBase, before: str, after: str, source: str
) -> tuple[str, str]:
    """What stands before and after a text where a user says `before + text + after`.

    Raises:
        BadData: if the template does not say the user's words once.
    """
    turn = [{"role": "user", "content": before + MARK + after}]
    sides = render(tokenizer, turn, None, source, "a single turn of the user").split(MARK)
    if len(sides) != 2:
        raise BadData(
            f"source {source!r}: the tokenizer's chat template says the user's words {len(sides) - 1} times: "
            "set chat_template: false, or mend the template"
        )
    return sides[0], sides[1]


def encode_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a rendered chat or a part of one."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens
