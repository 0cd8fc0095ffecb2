"""Commands for what serves a drafter: export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.app import app


@app.command("export", short_help="Write a drafter as vLLM or SGLang loads it.")
def export_drafter(
    drafter: Annotated[Path, typer.Argument(metavar="DRAFTER", help="Model folder of a trained drafter.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder.")],
    engine: Annotated[Literal["vllm", "sglang"], typer.Option("--for", help="The engine.")],
    target: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The target's folder, which a head needs.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Entries that it sees; default: all.")] = None,
    sinks: Annotated[int, typer.Option(min=0, help="How many of them are the first ones.")] = 0,
) -> None:
    """Write a drafter in the layout of a serving engine, and print how the engine is started with it."""
    from pipeline.errors import BadData
    from pipeline.serving.export import export_for

    layers = None
    if target is not None:
        try:
            layers = int(
                json.loads((target / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BadData(f"--target {target}: it holds no config.json of a model ({error!r})") from error
    typer.echo(export_for(drafter, output, engine, layers, window, sinks))
