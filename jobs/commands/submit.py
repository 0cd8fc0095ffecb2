"""Runs the command line as a Ray job: what is checked before, what is sent, and how the job is followed."""

from __future__ import annotations

import asyncio
import getpass
import http.client
import json
import logging
import os
import shlex
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import was_terminated
from jobs.executors.ray_cluster import HELD
from jobs.executors.ray_job import check_storage
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, Incomplete, hide_credentials
from pipeline.store.provenance import COMMIT, provenance

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger(__name__)

ADDRESS = "RAY_API_SERVER_ADDRESS"
# In addition to what .gitignore, .rayignore and Ray itself leave out.
EXCLUDES = ("/.git/", "/.venv/", "/runs/")
POLL_S = 0.5
STARTING = "No available agent"  # answer of a head's server while its agent is not up yet
STARTING_S = 60.0
ANSWER_S = 20.0
GIGABYTE = 10**9


@dataclass(frozen=True)
class Job:
    """What a job runs, and what its own process asks for: CPUs, and GB (10^9 bytes) of memory.

    `arguments` are overrides and options as given. `stop_wait_s` are the seconds between SIGTERM and SIGKILL
    when the job is stopped, for a last checkpoint.
    """

    stage: str
    config_path: Path
    arguments: Sequence[str]
    cpus: float | None = None
    memory_gb: float | None = None
    stop_wait_s: int = 120

    def entry_point(self, folder: Path) -> str:
        """The job's shell command, quoted so that no shell changes its arguments.

        Args:
            folder: the working directory that travels with the job; the config must lie in it.

        Raises:
            ConfigError: if the config lies elsewhere, or an argument holds a password.
        """
        try:
            config = self.config_path.resolve().relative_to(folder.resolve())
        except ValueError:
            raise ConfigError(
                f"{self.config_path} is not below {folder}, the working directory that is sent with the job: "
                "go to the folder that holds the code and the config, or copy the config there"
            ) from None
        command = shlex.join(["python", "-m", "jobs", self.stage, str(config), *self.arguments])
        if hide_credentials(command) != command:
            raise ConfigError(
                "an override holds a user and a password, which the dashboard and the logs of the job would "
                "show: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the head is started"
            )
        return command


def submit(config: Config, job: Job, address: str, wait: bool) -> int:
    """Send a job to the cluster at `address` and say how to look after it; returns an exit code.

    Raises:
        ConfigError: if it cannot run as a job, or the cluster does not take it.
    """
    check_storage(config.storage)
    folder = Path.cwd()
    entrypoint = job.entry_point(folder)
    client = connect(address)
    check_room(job, address)
    job_id = send(client, job, entrypoint, folder, config.name)
    for what, verb in (("status", "status"), ("logs", "logs --follow"), ("stop", "stop")):
        print(f"{what}: ray job {verb} --address {address} {job_id}", file=sys.stderr)
    print(job_id, flush=True)
    return follow(client, job_id) if wait else 0


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server.

    Raises:
        ConfigError: if nobody answers at `address`, or it does not take our token.
    """
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {address}: the dashboard's address is asked for, as http://127.0.0.1:8265"
        )
    check_answer(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:  # its loggers have levels of their own
        handler.setLevel(logging.ERROR)
    # This variable wins over the client's argument, so the address is handed over in it.
    os.environ[ADDRESS] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        mode, path = (os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"))
        raise ConfigError(
            f"the cluster at {address} does not take our token (RAY_AUTH_MODE is {mode or 'not set'}, "
            f"RAY_AUTH_TOKEN_PATH is {path or 'not set'}): set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
            "to the token file that the head was started with"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"no Ray job server answers at {address} ({_first_line(error)}): start a head, or set --address "
            f"or {ADDRESS} to the address of its dashboard, as http://127.0.0.1:8265"
        ) from None


def check_answer(address: str) -> None:
    """Raise ConfigError where an address is silent. Ray's client judges every answer, and waits for ever."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=ANSWER_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            raise ConfigError(
                f"{address} says nothing for {ANSWER_S:g} s: start a head, or set --address or {ADDRESS} to "
                "the address of its dashboard, as http://127.0.0.1:8265"
            ) from None


def check_room(job: Job, address: str) -> None:
    """Raises ConfigError where no node could ever hold the job's own process, which would wait in vain."""
    wanted = {"CPU": job.cpus or 0, "memory": (job.memory_gb or 0) * GIGABYTE}
    if not any(wanted.values()):
        return
    from ray.util.state import list_nodes

    nodes = [node.resources_total for node in list_nodes(address=address) if node.state == "ALIVE"]
    # A head that has just started may not know any node yet.
    if nodes and not any(
        all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes
    ):
        have = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('memory', 0) / GIGABYTE:.1f} GB" for n in nodes)
        raise ConfigError(
            f"--entrypoint-cpus {wanted['CPU']:g} and --entrypoint-memory-gb {wanted['memory'] / GIGABYTE:g} "
            f"fit no node of the cluster ({have})"
        )


def send(client: JobSubmissionClient, job: Job, entrypoint: str, folder: Path, name: str) -> str:
    """Upload the working directory and start the job; returns its id. Waits for a head that still starts.

    Raises:
        ConfigError: if the cluster refuses it.
    """
    code = provenance()
    commit = f"{code['git_sha'] or 'unknown'}{'+dirty' if code['git_dirty'] else ''}"
    held = {"CPU": job.cpus or 0, "memory": (job.memory_gb or 0) * GIGABYTE}
    environment = {
        "working_dir": str(folder),
        "excludes": list(EXCLUDES),
        # Read by the job's supervisor, which has these variables too.
        "env_vars": {
            "RAY_JOB_STOP_WAIT_TIME_S": str(job.stop_wait_s),
            COMMIT: commit,
            HELD: json.dumps({name: amount for name, amount in held.items() if amount}),
        },
    }
    metadata = {
        "name": name,
        "stage": job.stage,
        "git_commit": commit,
        "submitted_by": getpass.getuser(),
    }
    deadline = time.monotonic() + STARTING_S
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                runtime_env=environment,
                metadata=metadata,
                entrypoint_num_cpus=job.cpus,
                entrypoint_memory=None if job.memory_gb is None else int(job.memory_gb * GIGABYTE),
            )
        except (OSError, RuntimeError, ValueError) as error:
            if STARTING not in str(error) or time.monotonic() > deadline:
                raise ConfigError(f"the cluster did not take the job: {_first_line(error)}") from None
            log.info("the cluster is still starting, and is asked again")
            time.sleep(POLL_S)


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print the job's logs on stdout until it ends; returns its exit code, or 1 where it ended without one.

    Ctrl-C and SIGTERM stop the following, not the job, and give 130 and 143.

    Raises:
        Incomplete: if the cluster no longer answers.
    """
    try:
        asyncio.run(_print_logs(client, job_id))
        info = client.get_job_info(job_id)
        while not info.status.is_terminal():  # the logs end a moment before the job does
            time.sleep(POLL_S)
            info = client.get_job_info(job_id)
    except KeyboardInterrupt:
        print(f"no longer following; the job {job_id} goes on", file=sys.stderr)
        return 143 if was_terminated() else 130
    except (OSError, RuntimeError) as error:
        raise Incomplete(
            f"the job {job_id} is out of sight ({_first_line(error)}); where the cluster lives it goes on"
        ) from error
    code = info.driver_exit_code
    log.info("job %s: %s%s", job_id, info.status, "" if code is None else f", exit code {code}")
    if code is None:
        log.error("job %s: %s", job_id, info.message)
        return 1
    return code if code >= 0 else 128 - code  # as a shell names the signal


async def _print_logs(client: JobSubmissionClient, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
