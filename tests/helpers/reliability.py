"""docs/reliability.md: what `make test-faults` and `make soak` measured, from the files that they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined

from tests.helpers.paths import ROOT

FAULTS, SOAK, PAGE = ROOT / "faults.json", ROOT / "soak.json", ROOT / "docs" / "reliability.md"
MEANING = {"0": "whole", "4": "incomplete", "143": "SIGTERM", "-9": "killed by the soak"}


def write_page() -> None:
    PAGE.write_text(page(read(FAULTS), read(SOAK)), encoding="utf-8")


def read(file: Path) -> Any:
    """None where it was not measured yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def page(faults: list[dict[str, Any]] | None, soak: dict[str, Any] | None) -> str:
    template = Path(__file__).with_suffix(".md.j2").read_text(encoding="utf-8")
    options = {"trim_blocks": True, "keep_trailing_newline": True, "undefined": StrictUndefined}
    return (
        Environment(**options)
        .from_string(template)
        .render(
            faults=faults,
            soak=soak,
            meaning=MEANING,
            memory=soak and thirds([size / 2**20 for size in soak["driver_bytes"]]),
            files=soak and thirds(soak["driver_files"]),
        )
    )


def thirds(values: Sequence[float]) -> tuple[int, int]:
    """The medians of the first and of the last third."""
    third = max(1, len(values) // 3)
    return round(median(values[:third])), round(median(values[-third:]))
