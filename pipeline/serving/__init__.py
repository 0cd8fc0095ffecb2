"""A finished drafter beside its target, for programs of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.serving.pair import load_pair as load_pair


def __getattr__(name: str) -> Any:
    """`load_pair`, which model cards that are published name here; loaded when it is asked for."""
    if name == "load_pair":
        from pipeline.serving.pair import load_pair

        return load_pair
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
