"""What `budgetdraft doctor` says of the surroundings of a run: its storage, MLflow, Ray."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.schema import Config
from pipeline.errors import ConfigError, hide_credentials
from pipeline.store.storage import make_storage, with_home

LOW_SPACE_GB = 10.0
NO_SPACE_GB = 1.0


@dataclass(frozen=True)
class Check:
    """One line of the table. `text` says what was found and, unless ok, what to do."""

    status: Literal["ok", "warn", "fail"]
    name: str
    text: str


def storage(config: Config) -> Iterator[Check]:
    """Whether the folder can be made and written, and the space on its disk."""
    from pipeline.store.files import write_text

    try:
        folder = make_storage(config.storage)
    except ConfigError as error:
        yield Check("fail", "storage", str(error))
        return
    probe = folder / f".doctor-{os.getpid()}"
    try:
        write_text(probe, "written, synced and renamed\n")
        probe.unlink()
    except OSError as error:
        yield Check("fail", "storage", f"{folder} cannot be written: {error}; set storage=PATH")
        return
    yield Check("ok", "storage", f"{folder} can be written")
    free = shutil.disk_usage(folder).free / 1e9
    status: Literal["ok", "warn", "fail"] = "ok" if free >= LOW_SPACE_GB else "warn"
    hint = "" if status == "ok" else "; labels and checkpoints may need more: free some, or set storage=PATH"
    yield Check("fail" if free < NO_SPACE_GB else status, "free space", f"{free:.1f} GB{hint}")
    joins = config.run.executor == "ray" and config.run.ray_address not in (None, "local")
    if joins and not with_home(config.storage).is_absolute():
        yield Check("warn", "storage", "is relative: on a cluster give an absolute path that all nodes share")


def tracking(config: Config) -> Check:
    """Whether MLflow would take runs."""
    if not config.tracking.enabled:
        return Check("ok", "tracking", "off (tracking.enabled: false)")
    from jobs.mlflow_address import tracking_problem, tracking_uri

    try:
        uri = tracking_uri(config)
    except ConfigError as error:
        return Check("fail", "tracking", str(error))
    problem = tracking_problem(uri)
    shown = hide_credentials(uri)
    if problem:
        return Check("fail", "tracking", f"{shown}: {problem}; or set tracking.enabled=false")
    return Check("ok", "tracking", shown)


def ray(config: Config) -> Check:
    """Whether something answers at Ray's address, or a Ray could be started here."""
    if config.run.executor == "inline":
        return Check("ok", "ray", "not used by --executor inline")
    from jobs.executors.ray_address import check_ray

    try:
        return Check("ok", "ray", check_ray(config.run))
    except ConfigError as error:
        return Check("fail", "ray", str(error))
