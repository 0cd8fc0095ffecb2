"""Rows of a benchmark: values with intervals, beside the targets that they are to reach.

Whatever is compared runs interleaved in one process, repeat after repeat, so that a slow moment of the
machine falls on both sides. A value is the median over the repeats, its interval a 95 % bootstrap of it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from pipeline.hardware import cpu_name

LIBRARIES = ("torch", "transformers", "triton", "liger_kernel", "ray", "mlflow")


@dataclass(frozen=True)
class Row:
    """One measured figure. `target` is what it has to reach, from below or (`at_most`) from above.

    `value` is None where the device that the row needs is missing; `synthetic` is true where the acceptance
    was set instead of measured.
    """

    row: str
    value: float | None
    low: float | None
    high: float | None
    target: float | None
    met: bool | None
    device: str
    synthetic: bool = False
    at_most: bool = False
    unit: str = "×"
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""


def row(
    name: str,
    samples: Sequence[float],
    target: float | None = None,
    *,
    at_most: bool = False,
    synthetic: bool = False,
    unit: str = "×",
    note: str = "",
    device: str | None = None,
) -> Row:
    """A row from the samples of all repeats; without samples, one whose device is missing."""
    if not samples:
        return Row(name, None, None, None, target, None, device or "none", synthetic, at_most, unit, note)
    value, low, high = median(samples)
    met = None if target is None else bool(value <= target if at_most else value >= target)
    return Row(name, value, low, high, target, met, device or cpu_name(), synthetic, at_most, unit, note)


def median(samples: Sequence[float]) -> tuple[float, float, float]:
    """The median and a 95 % bootstrap interval of it."""
    values = np.asarray(samples, dtype=float)
    draws = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def seconds_of(run: Callable[[], object]) -> float:
    """By the wall clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def interleaved(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """The values of each run in `repeats` rounds of all runs; one round before these is thrown away."""
    for run in runs.values():
        run()
    values: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            values[name].append(run())
    return values


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """`above` ÷ `below`, repeat by repeat."""
    return [a / b for a, b in zip(above, below, strict=True)]


def environment() -> tuple[dict[str, str], str]:
    """Versions of what figures depend on, and the commit, with a + where files differ from it."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:  # a bare machine
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no")
    return versions, git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def write(rows: Sequence[Row], output: Path) -> None:
    """`bench.json`, whole or not at all."""
    versions, commit = environment()
    lines = [asdict(result) | {"versions": versions, "commit": commit} for result in rows]
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, output)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one a line."""
    width = max(len(result.row) for result in rows)
    lines = [f"{'row':{width}}  {'value':>9}  {'95 % interval':>19}  {'target':>8}  met"]
    for result in rows:
        sign = "≤" if result.at_most else "≥"
        target = "" if result.target is None else f"{sign} {result.target:g}"
        met = {True: "yes", False: "NO", None: ""}[result.met]
        if result.value is None:
            value, interval = "no GPU", ""
        else:
            value = f"{result.value:.3g}{result.unit}"
            interval = f"[{result.low:.3g}, {result.high:.3g}]"
        notes = " ".join(filter(None, ["(synthetic acceptance)" if result.synthetic else "", result.note]))
        line = f"{result.row:{width}}  {value:>9}  {interval:>19}  {target:>8}  {met:3}  {notes}"
        lines.append(line.rstrip())
    return "\n".join(lines)
