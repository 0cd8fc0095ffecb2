"""The command line. Imports of torch and the like stay inside commands, so that --help answers at once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from jobs import raise_on_sigterm, was_terminated
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.errors import BadData, ConfigError, Incomplete, NotFinite
from pipeline.observe.logs import PACKAGES

DONE, USAGE, BAD_DATA, INCOMPLETE, INTERRUPTED, TERMINATED = 0, 2, 3, 4, 130, 143
EPILOG = """\b
CONFIG is a YAML file, such as conf/quickstart.yaml. OVERRIDES change its fields:
  train.steps=10  sweep.budgets=[16,32]  train.variants.multi_view.sparse_weight=1
\b
Results and progress: results go to the storage folder, progress to stderr. The last line of stdout is
the path of what was made: summary.json for run and report, the artifact folder for other stages, the
model folder for convert, their JSON for gate and check-server; for export the engine's command.
\b
Exit codes:
  0    done
  1    unexpected error, with its traceback
  2    wrong usage or config; broken installation
  3    bad data: an input is missing or cannot be used, a plan does not fit, results do not compare
  4    incomplete: some work failed or diverged, a disk is full, MLflow is out of reach; what is done is
       kept, and the same command does the rest (doctor: a check failed)
  5    gate, check-server: worse than what is tolerated
  6    gate, check-server: not enough evidence
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
    """`12:30:05 train  text`: the file's name for our loggers, the full name for others; warnings say so."""

    def format(self, record: logging.LogRecord) -> str:
        package, *rooms = record.name.split(".")
        stage = rooms[-1] if package in PACKAGES and rooms else record.name
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {stage:<10} {level}{super().format(record)}"


def set_up_logging() -> None:
    """Our messages from INFO up and those of libraries from WARNING up, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_StageFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def load(path: Path, overrides: list[str] | None, executor: str | None, storage: str | None) -> Config:
    short = {"run.executor": executor, "storage": storage}
    # As JSON, which YAML reads as the same text, whatever is in it.
    given = [f"{field}={json.dumps(value)}" for field, value in short.items() if value is not None]
    return load_config(path, [*(overrides or []), *given])
