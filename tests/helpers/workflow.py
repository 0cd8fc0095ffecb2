"""Runs the shell steps of a GitHub workflow on this machine, in order, each as a runner would.

By hand, with the servers up (docs/containers.md); `@FILE` stands for what is in a file:

    python -m tests.helpers.workflow .github/workflows/sweep.yml sweep FOLDER \\
        inputs.config=conf/cluster.yaml \\
        secrets.RAY_TOKEN=@FILE vars.RAY_API_SERVER_ADDRESS=…

Steps that use an action are left out, and so is `Install`: this environment is the one that is meant.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.clock import patience, wait_for

BIN = Path(sys.executable).parent
LEFT_OUT = ("Install",)
SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def goes_well(outcomes: Mapping[str, str]) -> bool:
    return not {"failure", "cancelled"} & set(outcomes.values())


# Condition of a step → whether it runs, by the outcomes of steps so far, by name, and its environment.
CONDITIONS = {
    None: lambda outcomes, env: goes_well(outcomes),
    "always()": lambda outcomes, env: True,
    "cancelled()": lambda outcomes, env: "cancelled" in outcomes.values(),
    "${{ !cancelled() && steps.submit.outcome == 'success' }}": lambda outcomes, env: (
        "cancelled" not in outcomes.values() and outcomes["Submit and follow"] == "success"
    ),
    "env.SERVER != ''": lambda outcomes, env: goes_well(outcomes) and env["SERVER"] != "",
    "env.PROMOTE == 'true'": lambda outcomes, env: goes_well(outcomes) and env["PROMOTE"] == "true",
}
PATIENCE_S = 60  # until a step that is to be cancelled says something
GRACE_S = 7.5  # of a runner, between SIGINT and worse


def read_workflow(path: Path) -> dict[str, Any]:
    """Its YAML, with the key `on`, which YAML 1.1 takes for a truth value, under that name."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in values.items()}


def resolve(text: str, given: Mapping[str, str]) -> str:
    """A value with its expressions filled in; names that are not in `given` are empty, as on a runner.

    An expression is alternatives with `||` of terms with `&&` of names, literals and comparisons with `==`.
    """

    def operand(text: str) -> str:
        text = text.strip()
        return text.strip("'") if text.startswith("'") else given.get(text, "")

    def term(text: str) -> str:
        left, equals, right = text.partition("==")
        if equals:
            return "true" if operand(left) == operand(right) else ""
        return operand(left)

    def alternative(text: str) -> str:
        values = [term(part) for part in text.strip().strip("()").split("&&")]
        return values[-1] if all(values) else ""

    def value(found: re.Match[str]) -> str:
        return next(filter(None, map(alternative, found[1].split("||"))), "")

    return EXPRESSION.sub(value, str(text))


def run_job(
    path: Path,
    job: str,
    checkout: Path,
    folder: Path,
    given: Mapping[str, str],
    programs: Path,
    cancelled_in: str | None = None,
) -> dict[str, str]:
    """Run the shell steps of a job; returns each step's outcome: success, failure, skipped, cancelled.

    What a step prints goes to `<name>.log` in `folder`, where the files lie that steps write for the runner.

    Args:
        given: values of expressions, such as `inputs.config`.
        programs: folder that is searched for commands first.
        cancelled_in: name of the step in which somebody cancels the run, once it has printed something.
    """
    workflow = read_workflow(path)
    job_env = workflow.get("env", {}) | workflow["jobs"][job].get("env", {})
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    outcomes: dict[str, str] = {}
    for step in workflow["jobs"][job]["steps"]:
        name = step.get("name", step.get("uses"))
        if "run" not in step or name in LEFT_OUT:
            continue
        own = {key: resolve(text, given) for key, text in (job_env | step.get("env", {})).items()}
        if not CONDITIONS[step.get("if")](outcomes, own):
            outcomes[name] = "skipped"
            continue
        kept = dict(line.split("=", 1) for line in files["GITHUB_ENV"].read_text().splitlines())
        (folder / "step.sh").write_text(step["run"], encoding="utf-8")
        output = folder / f"{name}.log"
        with output.open("w") as log:
            process = subprocess.Popen(
                [*SHELL, str(folder / "step.sh")],
                cwd=checkout,
                env={
                    **os.environ, **own, **kept,
                    **{key: str(file) for key, file in files.items()},
                    "PYTHONPATH": str(checkout),  # as an editable installation does
                    "RUNNER_TEMP": str(folder), "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            if name == cancelled_in:
                cancel(process, output)
                outcomes[name] = "cancelled"
            else:
                outcomes[name] = "failure" if process.wait() else "success"
    return outcomes


def cancel(step: subprocess.Popen[bytes], output: Path) -> None:
    """End a step as a runner does: SIGINT to all of it, and after a grace SIGKILL."""
    wait_for(lambda: output.stat().st_size, "it said something to be cancelled after", PATIENCE_S, step)
    os.killpg(step.pid, signal.SIGINT)
    try:
        step.wait(patience(GRACE_S))
    except subprocess.TimeoutExpired:
        os.killpg(step.pid, signal.SIGKILL)
        step.wait()


def own_command(folder: Path) -> Path:
    """A folder with `budgetdraft` as an installation has it: this interpreter, the checkout's code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "budgetdraft").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jobs "$@"\n')
    (folder / "budgetdraft").chmod(0o755)
    return folder


if __name__ == "__main__":
    workflow, job, folder = sys.argv[1:4]
    given = dict(pair.split("=", 1) for pair in sys.argv[4:])
    # Secrets are read from files: the list of processes shows arguments to everyone.
    given |= {name: Path(text[1:]).read_text() for name, text in given.items() if text.startswith("@")}
    made = Path(folder).absolute()
    outcomes = run_job(Path(workflow), job, Path.cwd(), made, given, own_command(made / "bin"))
    for name, outcome in outcomes.items():
        print(f"{outcome:<8} {name}")
    sys.exit("failure" in outcomes.values())
