"""How the pipeline runs: command line, stages, Ray, DeepSpeed, MLflow. What is computed is in `pipeline`.

    cli/        the command line: its options, its exit codes
    stages/     the stages, each inputs → artifact, and the pipeline that runs them in order
    executors/  where work runs: in this process, on Ray, under DeepSpeed; what happens when a worker dies
    records/    the record of a run, and its status
    mlflow_address.py  where MLflow is, and what is wrong with an address
    tracking/   MLflow's mirror of a run
    registry/   versions of drafters in MLflow's registry, the champion, the gate before it
    plan/       `budgetdraft plan`: what a config will need, by the formulas of pipeline/plan
    commands/   what the other commands do: doctor, submit, artifacts, recommend, generate, check-server

Importing this package sets environment variables that these libraries read on import; a value that the user
has set stands. The package also defines how SIGTERM ends a process.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train's pause between two checks of its workers; it delays every report of a checkpoint.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # the patch prints every line of a worker twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning for every task that asks for no GPU
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # tracking/writer.py tries again, and knows when to stop
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. A KeyboardInterrupt, so that code that cleans up after Ctrl-C also cleans up here."""


_received: set[int] = set()


def raise_on_sigterm() -> None:
    """Make SIGTERM raise `Terminated`. Call it again after `ray.init`, which sets a handler of its own."""

    def handler(signum: int, frame: FrameType | None) -> None:
        _received.add(signum)
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


def was_terminated() -> bool:
    """Whether SIGTERM arrived. Ray turns a `Terminated` raised during its calls into a plain interrupt."""
    return signal.SIGTERM in _received
