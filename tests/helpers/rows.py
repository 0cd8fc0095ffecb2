"""Rows from flat values: a test names a policy, a count or a time without saying where a row nests it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar

from pipeline.axes import Cell, View
from pipeline.metrics import Counts
from pipeline.store.rows import OfCell, Speed, Timing

RowT = TypeVar("RowT", bound=OfCell)

VIEW = {one.name for one in fields(View)}
CELL = {one.name for one in fields(Cell)} - {"view"}
COUNTS = {one.name for one in fields(Counts)}


def take(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Move the named values that there are out of `values`."""
    return {name: values.pop(name) for name in names if name in values}


def cell_of(**values: Any) -> Cell:
    return Cell(view=View(**take(values, VIEW)), **values)


def make(kind: type[RowT], **values: Any) -> RowT:
    """A row of a cell; a timing or a speed is in it where one of its values is given."""
    own = take(values, kind.model_fields)
    if "cell" not in own:
        own["cell"] = cell_of(**take(values, VIEW | CELL))
    if "counts" in kind.model_fields:
        own["counts"] = Counts(**take(values, COUNTS))
    for name, part in (("timing", Timing), ("speed", Speed)):
        if name in kind.model_fields and (inner := take(values, part.model_fields)):
            own[name] = part(**inner)
    assert not values, f"{kind.__name__} has no {', '.join(values)}"
    return kind(**own)


def varied(row: RowT, **values: Any) -> RowT:
    """The row with other values, wherever it nests them."""
    changes = take(values, type(row).model_fields)
    if inner := take(values, VIEW | CELL):
        changes["cell"] = row.cell.vary(**inner)
    if "counts" in type(row).model_fields and (inner := take(values, COUNTS)):
        changes["counts"] = replace(row.counts, **inner)  # type: ignore[attr-defined]
    for name, part in (("timing", Timing), ("speed", Speed)):
        if name in type(row).model_fields and (inner := take(values, part.model_fields)):
            changes[name] = getattr(row, name).model_copy(update=inner)
    assert not values, f"{type(row).__name__} has no {', '.join(values)}"
    return row.model_copy(update=changes)
