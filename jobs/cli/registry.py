"""Commands around MLflow's model registry: gate, pull, rollback."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from jobs.cli.app import app
from jobs.cli.engines import EngineOption, GammaOption, SinksOption, TargetOption, WindowOption, exported
from pipeline.config.files import load_group
from pipeline.config.gate import GateConfig
from pipeline.errors import ConfigError

ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Registered model; default: the only one.")
]
TrackingOption = Annotated[
    str,
    typer.Option("--tracking-uri", metavar="URI", envvar="MLFLOW_TRACKING_URI", help="Where MLflow is."),
]
LOCAL = "sqlite:///runs/mlflow.db"
SIDE = (
    "an alias, a version's number, the id of the MLflow run or Ray job that registered it; or finished "
    "results, RESULTS or RESULTS:DRAFTER, such as runs/report-…:multi_view"
)


@app.command("gate", short_help="Compare a candidate with the champion: pass, fail, or not known yet.")
def gate_candidate(
    candidate: Annotated[str, typer.Option(metavar="RUN", help=f"Who wants to be champion: {SIDE}.")],
    baseline: Annotated[str, typer.Option(metavar="RUN", help="Whom it is compared with.")] = "champion",
    config: Annotated[Path, typer.Option(metavar="FILE", help="Margins and error rate.")] = Path(
        "conf/gate.yaml"
    ),
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="OVERRIDES", help="field=value of it, such as margins.acceptance=0.02."),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where gate.json, gate.md and gate.png go.")
    ] = Path("gate"),
    promote: Annotated[
        bool, typer.Option("--promote", help="Make a candidate that passes the champion.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --promote: also one that somebody rolled back from.")
    ] = False,
    model: ModelOption = None,
    tracking_uri: TrackingOption = LOCAL,
) -> None:
    """Compare a candidate with a baseline, prompt by prompt; exit code 5: fail, 6: not enough evidence."""
    named = [f"model={model}"] if model else []
    loaded = load_group(GateConfig, config, [*(overrides or []), *named])
    from jobs.registry.gate import EXIT_CODES, JSON, decide

    decision = decide(candidate, baseline, loaded, output, tracking_uri, promote, again)
    typer.echo("\n".join([decision.verdict.replace("_", " "), *decision.reasons]), err=True)
    if promote and decision.verdict == "pass":
        typer.echo(f"{decision.model} version {decision.candidate.version} is the champion", err=True)
    typer.echo((output / JSON).resolve())
    raise typer.Exit(EXIT_CODES[decision.verdict])


@app.command("pull", short_help="Fetch a registered drafter as a Hugging Face folder.")
def pull_drafter(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REFERENCE",
            help="champion or another alias, a version's number, or the id of the MLflow run or Ray job that "
            "registered it.",
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    engine: EngineOption = None,
    target: TargetOption = None,
    window: WindowOption = None,
    sinks: SinksOption = 0,
    gamma: GammaOption = 3,
    model: ModelOption = None,
    tracking_uri: TrackingOption = LOCAL,
) -> None:
    """Fetch a registered drafter into a new folder that plain from_pretrained loads, or an engine; files are
    checked."""
    from jobs.registry.versions import pull, resolve

    if engine is None and (window is not None or sinks):
        raise ConfigError("--window and --sinks are for an engine: name it with --for")
    version = resolve(tracking_uri, model, reference)
    if engine is None:
        made = pull(version, folder)
    else:
        with TemporaryDirectory(prefix="budgetdraft-") as temporary:
            pulled = pull(version, Path(temporary) / "pulled")
            typer.echo(exported(pulled, folder, engine, target, window, sinks, gamma), err=True)
        made = folder
    typer.echo(f"{version}: {version.tags['drafter']}, trained for {version.tags['budgets']}", err=True)
    typer.echo(made)


@app.command("rollback", short_help="Make the champion before the present one champion again.")
def roll_back(
    to: Annotated[
        int | None,
        typer.Option(metavar="N", help="Back to this version; nothing is done if it is the champion."),
    ] = None,
    model: ModelOption = None,
    tracking_uri: TrackingOption = LOCAL,
) -> None:
    """Move the alias champion back, by one step or to a version; exit code 3 if there is none to go to."""
    from jobs.registry.champion import rollback

    before, now = rollback(tracking_uri, model, to)
    typer.echo(f"champion: {f'version {before}' if before else 'none'} → version {now}")
