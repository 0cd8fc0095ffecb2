"""What commands that write a drafter for an engine have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.errors import BadData

LayoutName = Literal["vllm", "sglang", "speculators"]
EngineOption = Annotated[
    LayoutName | None, typer.Option("--for", help="Write it as this engine, or format, has it.")
]
TargetOption = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="The target's folder, which a head needs.")
]
WindowOption = Annotated[int | None, typer.Option(min=1, help="Entries that it sees; default: all.")]
SinksOption = Annotated[int, typer.Option(min=0, help="How many of them are the first ones.")]
GammaOption = Annotated[
    int, typer.Option(min=1, help="Proposals a round, in the engine's command line.", show_default=True)
]


def exported(
    drafter: Path,
    output: Path,
    engine: LayoutName,
    target: Path | None,
    window: int | None,
    sinks: int,
    gamma: int,
) -> str:
    """Write it as `export_for` does; returns the engine's command line."""
    from pipeline.serving.export import export_for

    return export_for(drafter, output, engine, layers_of(target), window, sinks, target, gamma)


def layers_of(target: Path | None) -> int | None:
    """How many layers a target has, by its config."""
    if target is None:
        return None
    try:
        return int(json.loads((target / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadData(f"--target {target}: it holds no config.json of a model ({error!r})") from error
