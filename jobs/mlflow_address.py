"""MLflow's address, what is wrong with it, and links to its pages. For tracking, registry and doctor."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from pipeline.config.schema import Config
from pipeline.errors import hide_credentials
from pipeline.store.storage import storage_folder

# In a sqlite file's address, what the database's library takes for options or decodes, and MLflow does not:
# they would write to different files. Options themselves may follow.
NO_FILE_NAME = re.compile(r"\?(?!\w+=[^/]*$)|%[0-9A-Fa-f]{2}")


def tracking_uri(config: Config) -> str:
    """The configured store, or a sqlite file in the storage folder."""
    return config.tracking.uri or f"sqlite:///{storage_folder(config.storage)}/mlflow.db"


def where_given(config: Config) -> str:
    """The field that says where MLflow is, with its value, for messages."""
    if config.tracking.uri:
        return f"tracking.uri = {config.tracking.uri}"
    return f"storage = {config.storage}, where MLflow's store is by default"


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for other stores."""
    file = uri.partition("?")[0].removeprefix("sqlite:///")
    return Path(file) if uri.startswith("sqlite:///") else None


def is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


def tracking_problem(uri: str) -> str | None:
    """Why this store cannot be used, or None. Asks a server for its health, for at most 5 seconds."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        return f"this is no address: {error}"
    if parts.scheme in ("", "file"):
        return "MLflow no longer keeps runs in plain folders: use sqlite:///FILE or a server's http address"
    if parts.scheme == "sqlite":
        if (file := sqlite_file(uri)) is None:
            return "a sqlite file is written sqlite:///relative/path or sqlite:////absolute/path"
        if odd := NO_FILE_NAME.search(uri):
            return f"MLflow cannot keep a sqlite file whose path holds {odd.group()!r}: set another path"
        return _sqlite_problem(file)
    elif is_server(uri):
        address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):  # a server that asks for a login is there
                return f"{address} answers {error.code} {error.reason}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"no server answers at {address}: {getattr(error, 'reason', error)}"
    return None


def _sqlite_problem(file: Path) -> str | None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return None if os.access(file.parent, os.W_OK) else f"the folder {file.parent} cannot be written"
        with closing(sqlite3.connect(file)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.rollback()
    except (OSError, ValueError, sqlite3.Error) as error:
        return f"{file} cannot be written: {error}"
    return None


@dataclass(frozen=True)
class Ui:
    """The pages of one experiment in MLflow's UI."""

    uri: str
    experiment_id: str

    @property
    def command(self) -> str:
        """The shell command that starts the UI; "" where a server runs already."""
        if is_server(self.uri):
            return ""
        return f"mlflow ui --backend-store-uri {shlex.quote(hide_credentials(self.uri))} --port 5000"

    @property
    def base(self) -> str:
        if not is_server(self.uri):
            return "http://127.0.0.1:5000/#"
        return hide_credentials(self.uri).replace("***@", "").rstrip("/") + "/#"

    def run(self, run_id: str) -> str:
        return f"{self.base}/experiments/{self.experiment_id}/runs/{run_id}"

    def table(self, query: str, metric: str) -> str:
        """A link to the runs that a query finds, with charts, the greatest value of `metric` first."""
        asked = {
            "searchFilter": query,
            "orderByKey": f"metrics.`{metric}`",
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        return f"{self.base}/experiments/{self.experiment_id}/runs?{encoded(asked)}"

    def comparison(self, run_ids: Sequence[str]) -> str:
        asked = {
            "runs": json.dumps(run_ids, separators=(",", ":")),
            "experiments": json.dumps([self.experiment_id]),
        }
        return f"{self.base}/compare-runs?{encoded(asked)}"


def encoded(asked: Mapping[str, str]) -> str:
    return urlencode(asked, quote_via=quote, safe="")  # these pages do not read `+` as a blank
