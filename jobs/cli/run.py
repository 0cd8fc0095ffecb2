"""Commands that run stages: here, and as a job on a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.cli.app import ConfigPath, ExecutorOption, Overrides, StorageOption, app, load, set_up_logging
from jobs.commands.doctor import check_name_clash
from pipeline.store.layout import IMPROVE, STAGES, Until


def _add_stage(name: str, until: Until, help_text: str) -> None:
    def stage(
        config: ConfigPath,
        overrides: Overrides = None,
        executor: ExecutorOption = None,
        storage: StorageOption = None,
    ) -> None:
        loaded = load(config, overrides, executor, storage)
        check_name_clash()
        set_up_logging()
        from jobs.stages.pipeline import run_pipeline

        typer.echo(run_pipeline(loaded, until))

    app.command(name, help=help_text, short_help=help_text)(stage)


Command = Literal["run", "prepare", "teach", "train", "sweep", "report", "improve"]
# Command → the last stage that it runs, and its help; stage pretrain has no command.
COMMANDS: dict[Command, tuple[Until, str]] = {
    "run": (STAGES[-1], "Run all stages; what is complete is reused."),
    "prepare": ("prepare", "Read the data: packed sequences and evaluation prompts."),
    "teach": ("teach", "The target's labels and continuations, after the stages before."),
    "train": ("train", "Train the drafters, after the stages before."),
    "sweep": ("sweep", "Measure every cell of the sweep, after the stages before."),
    "report": ("report", "Tables, figures and findings, after the stages before."),
    "improve": (IMPROVE, "Improve a trained drafter in rounds, improve.rounds of them: serve, learn, gate."),
}
for _name, (_until, _help) in COMMANDS.items():
    _add_stage(_name, _until, _help)


@app.command("submit", short_help="Run a stage as a job on a Ray cluster.")
def submit_job(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
    stage: Annotated[Command, typer.Option(help="What to run.")] = "run",
    wait: Annotated[bool, typer.Option("--wait", help="Follow its logs; exit with its exit code.")] = False,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="Dashboard of the head.")
    ] = "http://127.0.0.1:8265",
    entrypoint_cpus: Annotated[
        float | None, typer.Option(min=0, help="CPUs for the job's own process; default: it asks for none.")
    ] = None,
    entrypoint_memory_gb: Annotated[
        float | None, typer.Option(min=0, help="Memory for it, in GB (10^9); default: it asks for none.")
    ] = None,
    stop_wait_s: Annotated[
        int, typer.Option(min=1, help="Seconds that `ray job stop` leaves for a last checkpoint.")
    ] = 120,
) -> None:
    """Check a config here, then run it as a job on a Ray cluster, with the working directory as its code."""
    loaded = load(config, overrides, executor, storage)
    set_up_logging()
    from jobs.commands.submit import Job, submit

    options = [("--executor", executor), ("--storage", storage)]
    arguments = [*(overrides or []), *(text for name, value in options if value for text in (name, value))]
    job = Job(stage, config, arguments, entrypoint_cpus, entrypoint_memory_gb, stop_wait_s)
    raise typer.Exit(submit(loaded, job, address, wait))
