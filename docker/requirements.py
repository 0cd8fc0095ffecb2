"""Prints what an image installs: the dependencies of pyproject.toml, and which build of torch."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(root: Path, device: str) -> list[str]:
    """Lines for pip, from two files in `root`. torch's CPU build is its version with the suffix `+cpu`.

    Raises:
        SystemExit: if `device` is neither cpu nor gpu.
    """
    if device not in ("cpu", "gpu"):
        raise SystemExit(f"DEVICE={device}: build with --build-arg DEVICE=cpu or DEVICE=gpu")
    dependencies: list[str] = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = (line for line in (root / "constraints.txt").read_text().split() if line.startswith("torch=="))
    build = f"{pin}+cpu" if device == "cpu" else f"{pin.replace('==', '!=')}+cpu"
    return [*dependencies, build]


if __name__ == "__main__":
    print(*requirements(Path(__file__).resolve().parent.parent, sys.argv[1]), sep="\n")
