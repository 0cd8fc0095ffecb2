"""Commands for what serves a drafter: export, check-server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.app import app, set_up_logging
from jobs.cli.engines import GammaOption, LayoutName, SinksOption, TargetOption, WindowOption, exported
from jobs.cli.registry import LOCAL, ModelOption, TrackingOption


@app.command("export", short_help="Write a drafter as vLLM, SGLang or speculators loads it.")
def export_drafter(
    drafter: Annotated[Path, typer.Argument(metavar="DRAFTER", help="Model folder of a trained drafter.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder.")],
    engine: Annotated[LayoutName, typer.Option("--for", help="The engine, or format.")],
    target: TargetOption = None,
    window: WindowOption = None,
    sinks: SinksOption = 0,
    gamma: GammaOption = 3,
) -> None:
    """Write a drafter in the layout of a serving engine, and print how the engine is started with it."""
    typer.echo(exported(drafter, output, engine, target, window, sinks, gamma))


@app.command("check-server", short_help="Compare what a server accepts with what replay promised.")
def check_a_server(
    url: Annotated[str, typer.Argument(metavar="URL", help="An OpenAI-compatible server that speculates.")],
    results: Annotated[
        Path, typer.Option(metavar="REPORT", help="Report folder of a finished run, or its summary.json.")
    ],
    gamma: Annotated[int, typer.Option(min=1, max=128, help="Tokens that it drafts per round.")],
    drafter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What it drafts with; default: the registered one, else the last."),
    ] = None,
    window: WindowOption = None,
    sinks: SinksOption = 0,
    plain: Annotated[
        str | None, typer.Option(metavar="URL", help="A server of the same target without speculation.")
    ] = None,
    served_as: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The server's name of the model; default: its only one."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of each data set and context.")] = 8,
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="How much less acceptance is tolerated, as a share.")
    ] = 0.02,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 600.0,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where check.json, check.md and check.png go.")
    ] = Path("check"),
    registered: Annotated[
        str | None,
        typer.Option(metavar="REFERENCE", help="The drafter in the registry, to keep this with it."),
    ] = None,
    model: ModelOption = None,
    tracking_uri: TrackingOption = LOCAL,
) -> None:
    """Send a run's prompts to a server; compare acceptance with replay. Exit code 5: fail, 6: not known."""
    set_up_logging()
    from jobs.commands.check_server import JSON, check_server, served_view
    from jobs.registry.gate import EXIT_CODES
    from jobs.registry.served import attach, must_be_of
    from jobs.registry.versions import resolve
    from pipeline.gate.evidence import open_results
    from pipeline.serving.client import Server

    version = resolve(tracking_uri, model, registered) if registered else None
    found = open_results(results, drafter or (version.tags.get("drafter") if version else None))
    view = served_view(window, sinks)
    if version is not None:
        must_be_of(version, found)
    servers = Server(url, served_as, limit), Server(plain, None, limit) if plain else None
    check = check_server(*servers, found, view, gamma, prompts, margin, output)
    typer.echo("\n".join([check.verdict.replace("_", " "), *check.reasons]), err=True)
    if version is not None:
        typer.echo(f"{version} has it under {attach(version, check, output)}", err=True)
    typer.echo((output / JSON).resolve())
    raise typer.Exit(EXIT_CODES[check.verdict])
