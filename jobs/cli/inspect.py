"""Commands that look and change nothing: artifacts, status, config, plan, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.app import ConfigPath, ExecutorOption, Overrides, StorageOption, app, load, set_up_logging
from jobs.commands.doctor import check_name_clash
from jobs.commands.doctor import doctor as run_doctor
from pipeline.config.files import dump_config
from pipeline.store.storage import storage_folder


@app.command("artifacts", short_help="What a storage holds, and who uses it; removes what nothing needs.")
def list_artifacts(
    storage: Annotated[Path, typer.Argument(metavar="STORAGE", help="Folder of all artifacts.")],
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete what no report is made from and no run works on.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --remove: only say what would go.")
    ] = False,
    older_than_days: Annotated[
        float, typer.Option(min=0, metavar="N", help="Remove only what has not changed for so long.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document in place of the table.")] = False,
) -> None:
    """List every artifact: state, size, age, who uses it; with --remove delete what nothing needs."""
    from jobs.commands.artifacts import artifacts

    artifacts(storage_folder(str(storage)), remove, dry_run, older_than_days, as_json)


@app.command("status", short_help="What a run has done, does and failed at, and how long it will take.")
def show_run(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="A record's name or its beginning, a config's name, or a path; default: the newest.",
        ),
    ] = None,
    storage: Annotated[Path, typer.Option(metavar="PATH", help="Folder of all artifacts.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document in place of the screen.")
    ] = False,
) -> None:
    """What a run has done, does and failed at, and how long it will take; exit code 3 if there is none."""
    from jobs.records.status import show_status

    typer.echo(show_status(storage_folder(str(storage)), run, as_json))


@app.command("config", short_help="Print the resolved config as YAML.")
def show_config(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
) -> None:
    """Print the resolved config as YAML: defaults, `extends` and overrides filled in."""
    typer.echo(dump_config(load(config, overrides, executor, storage)), nl=False)


@app.command("plan", short_help="What a config will cost, and whether it fits, before anything runs.")
def plan_costs(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="N", help="Device memory in GB (10^9); default: run.device's here."),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(min=1e-6, metavar="X", help="Effective TFLOP/s; default: measured, for scratch models."),
    ] = None,
    step_ms: Annotated[
        float | None,
        typer.Option(min=1e-6, metavar="X", help="Milliseconds of an AR step; default: as for --tflops."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document in place of the table.")] = False,
) -> None:
    """Tokens, disk, peak memory by stage, rows and device-hours; exit code 3 where something does not fit."""
    loaded = load(config, overrides, executor, storage)
    check_name_clash()
    set_up_logging()
    from jobs.plan.report import plan

    plan(loaded, as_json, memory_gb, tflops, step_ms)


@app.command("doctor", short_help="Check this machine and a config: what is wrong, what to do.")
def check_machine(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file to check too.")] = None,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
) -> None:
    """Check versions, devices, storage, tracking and, with a CONFIG, its data and models."""
    loaded = load(config, overrides, executor, storage) if config else None
    raise typer.Exit(run_doctor(loaded))
