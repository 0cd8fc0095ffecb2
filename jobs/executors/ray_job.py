"""Whether this process runs as a Ray job, and what such a job needs of its storage."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.errors import ConfigError

RAY_JOB = "ray_job"  # tag of a pipeline's run in MLflow: the submission id of its job
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in what a job runs


def in_ray_job() -> bool:
    """Whether a Ray job runs this process."""
    return JOB_CONFIG in os.environ


def job_id() -> str | None:
    """The submission id of the Ray job that this process runs for: what `budgetdraft submit` printed."""
    given = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    return given.get("metadata", {}).get("job_submission_id")


def check_storage(storage: str) -> None:
    """Raises ConfigError where a job would lose what it makes."""
    if not Path(storage).is_absolute():
        raise ConfigError(
            f"storage = {storage}: a Ray job runs in a copy of the working directory that goes when it ends; "
            "set an absolute path that all nodes share, as in storage=/shared/runs"
        )
