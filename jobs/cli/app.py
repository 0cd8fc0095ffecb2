"""The command line. Imports of torch and the like stay inside commands, so that --help answers at once."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from jobs import raise_on_sigterm, was_terminated
from jobs.cli import registry
from jobs.commands.doctor import check_name_clash
from jobs.commands.doctor import doctor as run_doctor
from pipeline.config.errors import ConfigError
from pipeline.config.files import dump_config, load_config
from pipeline.config.schema import Config
from pipeline.config.sweep import Policy, check_budget
from pipeline.errors import BadData, Incomplete, NotFinite
from pipeline.observe.logs import PACKAGES

DONE, USAGE, BAD_DATA, INCOMPLETE, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 130, 143
EPILOG = """\b
CONFIG is a YAML file, such as conf/quickstart.yaml. OVERRIDES change its fields:
  train.steps=10  sweep.budgets=[16,32]  train.variants.multi_view.sparse_weight=1
\b
Results and progress: results go to the storage folder, progress to stderr. The last line of stdout is
the path of what was made: summary.json for run and report, the artifact folder for other stages, the
model folder for convert.
\b
Exit codes:
  0    done
  1    unexpected error, with its traceback
  2    wrong usage or config; broken installation
  3    bad data: an input is missing or cannot be used
  4    incomplete: some work failed or diverged, a disk is full, MLflow is out of reach; what is done is
       kept, and the same command does the rest (doctor: a check failed)
  5    gate: the candidate is worse than what is tolerated
  6    gate: not enough evidence
  130  interrupted (Ctrl-C); the same command resumes
  143  terminated (SIGTERM); the same command resumes
"""


class _Commands(TyperGroup):
    """Turns the errors that users can act on into one screen on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        raise_on_sigterm()
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            _leave(USAGE, str(error))
        except BadData as error:
            _leave(BAD_DATA, f"bad data: {error}")
        except (Incomplete, NotFinite) as error:
            _leave(INCOMPLETE, f"incomplete: {error}")
        except KeyboardInterrupt:
            if was_terminated():
                _leave(TERMINATED, "terminated; the same command resumes")
            _leave(INTERRUPTED, "interrupted; the same command resumes")


def _leave(code: int, text: str) -> None:
    typer.echo(text, err=True)
    raise typer.Exit(code)


app = typer.Typer(
    name="budgetdraft",
    cls=_Commands,
    help="Train drafters for speculative decoding under a fixed KV budget, and measure what they are worth.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as conf/books.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="OVERRIDES", help="group.field=value, such as train.steps=10.")
]
ExecutorOption = Annotated[
    Literal["ray", "inline"] | None,
    typer.Option("--executor", help="Ray, or all in this process; short for run.executor=…"),
]
StorageOption = Annotated[
    str | None, typer.Option("--storage", metavar="PATH", help="Folder of all artifacts; short for storage=…")
]


class _StageFormatter(logging.Formatter):
    """`12:30:05 train  text` for our loggers, the full logger name for others; the level from warnings up."""

    def format(self, record: logging.LogRecord) -> str:
        package, _, module = record.name.partition(".")
        stage = module if package in PACKAGES and module else record.name
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {stage:<10} {level}{super().format(record)}"


def set_up_logging() -> None:
    """Our messages from INFO up and those of libraries from WARNING up, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_StageFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def _load(path: Path, overrides: list[str] | None, executor: str | None, storage: str | None) -> Config:
    short = {"run.executor": executor, "storage": storage}
    # JSON text is YAML that stays text whatever is in it.
    given = [f"{field}={json.dumps(value)}" for field, value in short.items() if value is not None]
    return load_config(path, [*(overrides or []), *given])


def _add_stage(name: str, until: str, help_text: str) -> None:
    def stage(
        config: ConfigPath,
        overrides: Overrides = None,
        executor: ExecutorOption = None,
        storage: StorageOption = None,
    ) -> None:
        loaded = _load(config, overrides, executor, storage)
        check_name_clash()
        set_up_logging()
        from jobs.stages.pipeline import run_pipeline

        typer.echo(run_pipeline(loaded, until))

    app.command(name, help=help_text, short_help=help_text)(stage)


_add_stage("run", "report", "Run all stages; what is complete is reused.")
_add_stage("prepare", "prepare", "Read the data: packed sequences and evaluation prompts.")
_add_stage("teach", "teach", "The target's labels and continuations, after the stages before.")
_add_stage("train", "train", "Train the drafters, after the stages before.")
_add_stage("sweep", "sweep", "Measure every cell of the sweep, after the stages before.")
_add_stage("report", "report", "Tables, figures and findings, after the stages before.")


@app.command("submit", short_help="Run a stage as a job on a Ray cluster.")
def submit_job(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
    stage: Annotated[
        Literal["run", "prepare", "teach", "train", "sweep", "report"], typer.Option(help="What to run.")
    ] = "run",
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
    loaded = _load(config, overrides, executor, storage)
    set_up_logging()
    from jobs.commands.submit import Job, submit

    options = [("--executor", executor), ("--storage", storage)]
    arguments = [*(overrides or []), *(text for name, value in options if value for text in (name, value))]
    job = Job(stage, config, arguments, entrypoint_cpus, entrypoint_memory_gb, stop_wait_s)
    raise typer.Exit(submit(loaded, job, address, wait))


@app.command("generate", short_help="Continue one prompt by speculation, streamed.")
def generate_text(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; default: standard input.")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(metavar="NAME", help="A variant of train.variants; default: the last one.")
    ] = None,
    policy: Annotated[
        Policy | None,
        typer.Option(help="Which prefix entries the drafter keeps; default: the sweep's first."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N|full", help="How many it keeps; default: the sweep's first.")
    ] = None,
    gamma: Annotated[
        int | None, typer.Option(min=1, max=128, help="Tokens drafted per round; default: the sweep's first.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.999999,
            help="Stop drafting behind a token of less probability; default: the sweep's first.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: data.max_new_tokens of the config.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
) -> None:
    """Continue one prompt by speculation, streamed, with acceptance, tau and speed against plain decoding."""
    loaded = _load(config, overrides, executor, storage)
    chosen_budget = loaded.sweep.budgets[0] if budget is None else _parse_budget(budget)
    check_name_clash()
    prompt = _read_prompt(prompt_file)
    set_up_logging()
    from jobs.commands.generate import generate

    generate(
        loaded,
        prompt=prompt,
        drafter=drafter,
        policy=policy or loaded.sweep.policies[0],
        budget=chosen_budget,
        gamma=gamma or loaded.sweep.gammas[0],
        threshold=loaded.sweep.thresholds[0] if threshold is None else threshold,
        temperature=temperature,
        max_new_tokens=max_new_tokens or loaded.data.max_new_tokens,
        seed=seed,
    )


def _parse_budget(text: str) -> int | Literal["full"]:
    if text == "full":
        return "full"
    try:
        budget = int(text)
        check_budget(budget)
    except ValueError:
        raise ConfigError(
            f'--budget {text}: a budget is "full", 0, or an integer of at least 16 divisible by 8'
        ) from None
    return budget


def _read_prompt(file: Path | None) -> str:
    if file is None and sys.stdin.isatty():
        typer.echo("Type a prompt; Ctrl-D on an empty line ends it.", err=True)
    name = str(file) if file else "standard input"
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    try:
        prompt = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadData(f"the prompt in {name} is not UTF-8 text: {error}") from None
    if not prompt.strip():
        raise BadData(f"the prompt in {name} is empty")
    return prompt


@app.command("recommend", short_help="What to deploy, from finished results.")
def recommend_cell(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A report folder, or its summary.json.")],
    context: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Prompt tokens to serve.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set of the results; default: each of them.")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Memory for weights and KV of both models, in GB (10^9).")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts that are in memory at once.")] = 1,
    min_acceptance: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Least share of proposals that are accepted.")
    ] = None,
) -> None:
    """What to deploy at a context, with the expected speedup, or why not to speculate there."""
    from jobs.commands.recommend import advise

    for line in advise(results, context, dataset, memory_gb, concurrency, min_acceptance):
        typer.echo(line)


@app.command("convert", short_help="Turn a .bin checkpoint into safetensors.")
def convert_checkpoint(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Model folder with pytorch_model.bin, or its shards.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder, to name in a config.")],
) -> None:
    """Turn a model folder with a pickled .bin checkpoint into one with safetensors; the source stays."""
    check_name_clash()
    set_up_logging()
    from pipeline.models.load import convert_bin

    convert_bin(source, output)
    typer.echo(output)


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

    artifacts(storage, remove, dry_run, older_than_days, as_json)


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

    typer.echo(show_status(storage, run, as_json))


@app.command("config", short_help="Print the resolved config as YAML.")
def show_config(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
) -> None:
    """Print the resolved config as YAML: defaults, `extends` and overrides filled in."""
    typer.echo(dump_config(_load(config, overrides, executor, storage)), nl=False)


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
    loaded = _load(config, overrides, executor, storage)
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
    loaded = _load(config, overrides, executor, storage) if config else None
    raise typer.Exit(run_doctor(loaded))


app.add_typer(registry.commands)


def main() -> None:
    app(prog_name="budgetdraft")
