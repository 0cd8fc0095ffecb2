"""Entry point: importing the commands puts them on the command line, in the order of `--help`."""

from __future__ import annotations

# isort: off
from jobs.cli.app import app
from jobs.cli import run, use, serve, inspect, registry
# isort: on

COMMANDS = (run, use, serve, inspect, registry)


def main() -> None:
    app(prog_name="budgetdraft")
