"""The study of conf/gpu.yaml on a machine that is rented for a while; docs/gpu.md has the whole way.

    python -m benchmarks.gpu_study carry PREPARED FOLDER
    python -m benchmarks.gpu_study run CONFIG [OVERRIDES …] --storage DIR --output DIR --minutes 8.5
    python -m benchmarks.gpu_study unpack OUTPUT STORAGE
    python -m benchmarks.gpu_study page CONFIG [OVERRIDES …] --storage DIR --output DIR --bench FILE \
        --notes FILE

`run` starts `budgetdraft run` in a process of its own and asks it to stop when the minutes are over. The run
keeps finished work, and the same command continues from it. Artifacts that are complete by then are packed
into `output`.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_study.travel import DOCUMENTS, light_copy, pack, unpack
from jobs import Terminated, raise_on_sigterm
from jobs.cli.app import BAD_DATA, DONE, TERMINATED, USAGE, set_up_logging
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.errors import BadData, ConfigError

GRACE_S = 60.0  # from the request to stop, upon which training ends its step and saves it, to the kill

log = logging.getLogger("jobs.gpu_study")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes are those of `budgetdraft`: 143 where the minutes were over, 2 and 3 for wrong input."""
    given = parser().parse_args(arguments)
    set_up_logging()
    try:
        if given.command == "carry":
            light_copy(given.prepared, given.folder, (DOCUMENTS,))
        elif given.command == "unpack":
            unpack(given.output, given.storage)
        elif given.command == "run":
            return run(given)
        else:
            from benchmarks.gpu_study.page import write_page

            write_page(config_of(given), given.bench, given.notes, given.output)
    except ConfigError as error:
        log.error("%s", error)
        return USAGE
    except BadData as error:
        log.error("bad data: %s", error)
        return BAD_DATA
    return DONE


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.gpu_study")
    commands = top.add_subparsers(dest="command", required=True)
    carry = commands.add_parser("carry", help="copy prepared data without the documents, to take along")
    carry.add_argument("prepared", type=Path, help="the folder that `budgetdraft prepare` printed")
    carry.add_argument("folder", type=Path, help="a new folder, to name in data.prepared")
    back = commands.add_parser("unpack", help="put what came back into a storage")
    back.add_argument("output", type=Path, help="the folder that `run` has packed into")
    back.add_argument("storage", type=Path)
    for name, text in (("run", "run for some minutes, then pack"), ("page", "write the page of results")):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path)
        command.add_argument("overrides", nargs="*", help="fields of the config, such as data.prepared=DIR")
        command.add_argument("--storage", default="runs")
        command.add_argument("--output", type=Path, required=True)
        if name == "run":
            command.add_argument("--minutes", type=float, default=8.5)
        else:
            command.add_argument("--bench", type=Path, required=True, help="of `benchmarks --only gpu`")
            command.add_argument("--notes", type=Path, required=True, help="Markdown: what did not work")
    return top


def config_of(given: argparse.Namespace) -> Config:
    return load_config(given.config, [*given.overrides, f"storage={json.dumps(given.storage)}"])


def run(given: argparse.Namespace) -> int:
    """Run the pipeline for the given minutes at most, then pack the complete artifacts into `output`."""
    config = config_of(given)
    command = [sys.executable, "-m", "jobs", "run", str(given.config), *given.overrides]
    process = subprocess.Popen([*command, "--storage", given.storage])
    raise_on_sigterm()  # stopping this process stops the run too, and what is done is packed all the same
    try:
        code = process.wait(60 * given.minutes)
    except (subprocess.TimeoutExpired, Terminated):
        log.info("the run is asked to stop")
        process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            log.error("the run did not stop within %g s and is killed; what it has saved is kept", GRACE_S)
            process.kill()
            process.wait()
        # A run that ends before it handles the request, or just then, has another exit code.
        code = process.returncode if process.returncode == DONE else TERMINATED
    pack(config, Path(config.storage), given.output)
    log.info("%s", "all is done" if code == DONE else f"exit code {code}; the same command goes on")
    return code


if __name__ == "__main__":
    sys.exit(main())
