"""Text and JSON that are nearly right, for hypothesis."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values below `value`, as keys and indices."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [] if not above else [above]
    for key, inner in below:
        found += places(inner, (*above, key))
    return found


@st.composite
def nearly(draw: st.DrawFn, value: Any) -> Any:
    """`value` with one to three of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(places(value) or [()]))
        if not way:
            return draw(JSON)
        holder = value
        for key in way[:-1]:
            holder = holder[key]
        change = draw(st.sampled_from(("replace", "remove", "rename")))
        if change == "replace":
            holder[way[-1]] = draw(JSON)
        elif change == "remove":
            del holder[way[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder.pop(way[-1])
    return value


@st.composite
def torn(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a piece cut out, doubled, or replaced by other bytes."""
    first = draw(st.integers(0, len(content)))
    last = draw(st.integers(first, min(len(content), first + 200)))
    filling = draw(st.sampled_from((b"", content[first:last] * 2)) | st.binary(max_size=20))
    return content[:first] + filling + content[last:]


def broken(value: Any) -> st.SearchStrategy[bytes]:
    """JSON of a value that is nearly right, or text that is nearly JSON."""
    text = nearly(value).map(lambda other: json.dumps(other).encode())
    return text | torn(json.dumps(value).encode())
