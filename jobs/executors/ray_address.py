"""The Ray that a run joins or starts, and what is wrong with its address or its folder for temporary files.

Ray itself tries an address where nothing answers for minutes, and what it then says names neither.
"""

from __future__ import annotations

import os
import signal
import socket
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType
from typing import Any

from jobs import raise_on_sigterm
from pipeline.config.run import Run
from pipeline.errors import ConfigError
from pipeline.store.storage import shortened

ADDRESS, FIELD, LOCAL = "RAY_ADDRESS", "run.ray_address", "local"
ANSWER_S = 5.0
# Environment variable: how often Ray asks an address for its cluster, half a minute each time.
TRIES = "RAY_gcs_server_port_wait_time_s"
SOCKET_BYTES = 107  # of the path of a Unix socket on Linux
SESSION = "session_{now:%Y-%m-%d_%H-%M-%S_%f}_{pid}"
STARTING = "see that it can write there (RAY_TMPDIR, TMPDIR), and its token below HOME, in ~/.ray"
JOINING = (
    "see that this is the address of a Ray head's GCS, of this version of Ray; if it asks for a token, set "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
)
LONGEST_SOCKET = "dash_MetricsHead"  # of those in a session's folder


def address_of(run: Run) -> str | None:
    """What `ray.init` is given. "local" starts a Ray; None leaves it to RAY_ADDRESS, or to the Ray job."""
    if run.ray_address:
        return run.ray_address
    return None if os.environ.get(ADDRESS) or "RAY_JOB_ID" in os.environ else LOCAL


def named(run: Run) -> tuple[str, str]:
    """The field or variable that gives the address, and the address: "auto" where Ray looks for one."""
    given = address_of(run) or "auto"
    if given == "auto" and os.environ.get(ADDRESS):
        return ADDRESS, os.environ[ADDRESS]
    return FIELD, given


def start_ray(run: Run, **options: Any) -> ModuleType:
    """Join or start the Ray of a run; `options` are those of `ray.init`. Returns the module.

    Raises:
        ConfigError: if that cannot be; the text names the field or the variable.
        Terminated: if SIGTERM arrives meanwhile.
    """
    what, starts = check_ray(run), named(run)[1] == LOCAL
    if not starts:
        os.environ.setdefault(TRIES, "1")
    import ray

    try:
        ray.init(address=address_of(run), **options)
    except SystemExit:  # from the handler of SIGTERM that Ray sets while it starts
        raise_on_sigterm()
        signal.raise_signal(signal.SIGTERM)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{what}: {first}; {STARTING if starts else JOINING}") from error
    raise_on_sigterm()  # Ray's own handler has replaced ours
    return ray


def check_ray(run: Run) -> str:
    """What Ray a run would use, in words, for messages.

    Raises:
        ConfigError: if nothing answers at its address, or a Ray cannot keep its files and sockets here.
    """
    name, given = named(run)
    if given == LOCAL:
        return f"a Ray of its own, in {check_folder()}"
    if given != "auto":
        check_answer(name, given)
    return f"{name} = {given}"


def check_answer(name: str, given: str) -> None:
    """Raise ConfigError unless something listens at an address, HOST:PORT or ray://HOST:PORT."""
    advice = (
        f"set {name} to the HOST:PORT of a running Ray head (of its GCS, most often port 6379), or "
        f"{FIELD}={LOCAL} to start a Ray here"
    )
    host, _, port = given.removeprefix("ray://").rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdecimal()):
        raise ConfigError(f"{name} = {given}: this is no HOST:PORT; {advice}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"{name} = {given}: nothing answers there ({error}); {advice}") from None


def check_folder() -> str:
    """The folder of a Ray that is started here.

    Raises:
        ConfigError: if it is relative or cannot be written, or if names of sockets in it would be too long.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    base = os.environ.get(name, "/tmp")
    advice = "set RAY_TMPDIR to a short absolute path that can be written, such as /tmp"
    if not os.path.isabs(base):
        raise ConfigError(f"{name} = {base!r}: Ray needs an absolute path there; {advice}")
    folder = os.path.join(base, "ray")
    session = SESSION.format(now=datetime.now(), pid=os.getpid())
    size = len(os.fsencode(os.path.join(folder, session, "sockets", LONGEST_SOCKET)))
    if size > SOCKET_BYTES:
        most = len(os.fsencode(base)) - (size - SOCKET_BYTES)
        raise ConfigError(
            f"{name} = {shortened(base)}: the paths of Ray's sockets there would have {size} bytes, and may "
            f"have {SOCKET_BYTES}; {advice} (at most {most} bytes)"
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} = {base}: {folder} cannot be written ({error.strerror}); {advice}"
        ) from None
    return folder
