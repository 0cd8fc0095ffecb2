"""From YAML text to values of which no two places share an object, and the lines that they stand on."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MOST_LEVELS = 50  # of values within values; the schema has ten
MOST_VALUES = 100_000  # with what aliases repeat: nine lines of them can stand for a billion


def read_yaml(text: str, name: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML text, of an empty one None, and the values that they stand for.

    Args:
        name: what the text is in error texts, a file for instance.

    Raises:
        yaml.YAMLError: also where it is nested too deep, or an anchor holds itself. The text names the line.
    """
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Safe YAML without its traps.

    A repeated key is an error, 1e-5 is a number, an alias is a copy of what it repeats, so that a change of
    the one leaves the other alone, and neither depth nor size is without end.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.levels = 0  # open around what is read now
        self.values = 0  # read so far

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        self._count(self.levels, event.start_mark)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        if not is_alias or node is None:
            return node
        if node.end_mark is None:  # its end is not read yet
            text = f"the anchor &{event.anchor} stands around its own alias *{event.anchor}"
            raise ComposerError(None, None, text, event.start_mark)
        return self._copy(node, self.levels, event.start_mark)

    def _copy(self, node: yaml.Node, level: int, mark: yaml.Mark) -> yaml.Node:
        """A node for the alias at `mark`; its values keep the lines that they stand on."""
        self._count(level, mark)
        children: list[Any]
        if isinstance(node, yaml.SequenceNode):
            children = [self._copy(item, level + 1, mark) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            children = [
                (self._copy(key, level + 1, mark), self._copy(value, level + 1, mark))
                for key, value in node.value
            ]
        else:
            return node
        return type(node)(node.tag, children, node.start_mark, node.end_mark, node.flow_style)

    def _count(self, level: int, mark: yaml.Mark) -> None:
        self.values += 1
        if level > MOST_LEVELS:
            raise ComposerError(None, None, f"it is nested more than {MOST_LEVELS} levels deep", mark)
        if self.values > MOST_VALUES:
            raise ComposerError(None, None, f"it holds more than {MOST_VALUES} values", mark)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if "\0" in (node.value if isinstance(node, yaml.ScalarNode) else ""):
            raise ConstructorError(
                None, None, "text with a NUL character, which no path can hold", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError):
            # Of what looks like a date or a number, or is tagged as one: 2025-02-30, 0x_.
            text = f"{str(node.value)[:70]!r} is no {node.tag.rpartition(':')[2]}; put text in quotes"
            raise ConstructorError(None, None, text, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                text = f"{key_node.value!r} stands on line {lines[key_node.value]} and again on line {line}"
                raise ConstructorError(None, None, text)
            lines[key_node.value] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
