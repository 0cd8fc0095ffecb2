"""Drafters in MLflow's model registry: found and fetched.

A version belongs to the MLflow run of the pipeline that registered it (`register.py`), and its files are
artifacts of that run: `hf_model/`, which plain `from_pretrained` loads, and `evidence/`, by which the gate
judges it. One version of a model is its champion (`champion.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jobs.executors.ray_job import RAY_JOB
from jobs.mlflow_address import sqlite_file, tracking_problem
from pipeline.errors import BadData, Incomplete, hide_credentials
from pipeline.gate.evidence import Evidence, load_evidence
from pipeline.store.files import file_sha256
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"  # alias
HF_MODEL, EVIDENCE, CHECKSUMS = "hf_model", "evidence", "checksums.json"
REGISTERED = "registered"  # tag REGISTERED.MODEL of a pipeline run: the version that came of it


@dataclass(frozen=True)
class Version:
    """A registered drafter. `run_id` is the run in MLflow whose artifacts it consists of."""

    uri: str
    model: str
    number: int
    run_id: str
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.model} version {self.number}"


@contextmanager
def registry(uri: str) -> Iterator[MlflowClient]:
    """A client of the registry at a tracking URI.

    Raises:
        Incomplete: if it is out of reach or refuses what the body asks.
    """
    problem = tracking_problem(uri)
    if problem is None and (file := sqlite_file(uri)) and not file.exists():
        problem = "there is no such file; name the store with --tracking-uri"
    if problem:
        raise Incomplete(f"MLflow at {hide_credentials(uri)}: {problem}")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, OSError) as error:  # its stores of artifacts raise errors of requests
        raise Incomplete(hide_credentials(f"MLflow at {uri}: {error}")) from None


# ── finding and fetching ──────────────────────────────────────────────────────────────────────────


def resolve(uri: str, model: str | None, reference: str) -> Version:
    """The version that an alias, a number, the id of a pipeline's MLflow run or its Ray job's id stands for.

    Args:
        model: None stands for the only model of the registry.

    Raises:
        BadData: if there is no such model or version.
        Incomplete: if MLflow is out of reach.
    """
    with registry(uri) as client:
        model = model or only_model(client)
        aliases = aliases_of(client, model)
        known = {int(v.version): v for v in client.search_model_versions(f"name = '{model}'")}
        number: int | None = aliases.get(reference)
        if number is None:
            number = int(reference) if reference.isdecimal() else number_by_run(client, model, reference)
        if number is None or number not in known:
            raise BadData(
                f"{model} has no {reference!r}: there are versions {sorted(known) or 'none'}, aliases "
                f"{sorted(aliases) or 'none'}, and what a pipeline's run or Ray job registered goes by its id"
            )
        return to_version(uri, known[number])


def only_model(client: MlflowClient) -> str:
    names = sorted(model.name for model in client.search_registered_models())
    if len(names) != 1:
        raise BadData(f"name a model with --model: the registry has {', '.join(names) or 'none'}")
    return names[0]


def aliases_of(client: MlflowClient, model: str) -> dict[str, int]:
    """Alias → number. Raises BadData if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(number) for alias, number in client.get_registered_model(model).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = ", ".join(sorted(entry.name for entry in client.search_registered_models()))
        raise BadData(f"the registry has no model {model!r}; it has {names or 'none'}") from None


def number_by_run(client: MlflowClient, model: str, reference: str) -> int | None:
    """The version that the pipeline's run or Ray job with this id has registered; None if there is none."""
    if not re.fullmatch(r"[\w.-]+", reference):
        return None
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for query in (f"attributes.run_id = '{reference}'", f"tags.{RAY_JOB} = '{reference}'"):
        for run in client.search_runs(experiments, query):
            if f"{REGISTERED}.{model}" in run.data.tags:
                return int(run.data.tags[f"{REGISTERED}.{model}"])
    return None


def to_version(uri: str, version: ModelVersion) -> Version:
    return Version(uri, version.name, int(version.version), version.run_id, version.tags)


def evidence_of(version: Version) -> Evidence:
    """The evidence by which the gate judges a version. Raises as `fetch` does."""
    with TemporaryDirectory() as temporary:
        return load_evidence(fetch(version, EVIDENCE, Path(temporary)))


def pull(version: Version, folder: Path) -> Path:
    """Fetch a version's Hugging Face folder, whole or not at all; returns its absolute path.

    Raises:
        BadData: if `folder` holds something, or a file is damaged.
        Incomplete: if MLflow is out of reach.
    """
    folder = with_home(folder).resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadData(f"{folder} is not empty: name a new folder")
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        fetch(version, HF_MODEL, temporary).rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def fetch(version: Version, part: str, into: Path) -> Path:
    """Download `hf_model` or `evidence` of a version, and compare every file with its checksum.

    Raises:
        BadData: if a file is missing or damaged, or does not belong to the version.
        Incomplete: if MLflow is out of reach.
    """
    known = {name: digest for name, digest in checksums(version).items() if name.startswith(f"{part}/")}
    with registry(version.uri) as client:
        client.download_artifacts(version.run_id, part, str(into))
    files = {str(file.relative_to(into)): file for file in (into / part).rglob("*") if file.is_file()}
    files.pop(f"{EVIDENCE}/{CHECKSUMS}", None)
    if strange := sorted(files.keys() - known.keys()):
        raise BadData(
            f"{version}: MLflow holds {', '.join(strange)}, which was not registered with it: delete it "
            "there, or register the drafter anew"
        )
    for name, digest in known.items():
        if name not in files or file_sha256(files[name]) != digest:
            raise BadData(f"{version}: {name} is damaged or missing in MLflow; register the drafter anew")
    return into / part


def checksums(version: Version) -> dict[str, str]:
    """The version's files → SHA-256. Raises as `fetch` does."""
    with TemporaryDirectory() as temporary, registry(version.uri) as client:
        file = Path(client.download_artifacts(version.run_id, f"{EVIDENCE}/{CHECKSUMS}", temporary))
        if file_sha256(file) != version.tags.get("checksums"):
            raise BadData(f"{version}: its {CHECKSUMS} is damaged; register the drafter anew")
        return dict(json.loads(file.read_text(encoding="utf-8")))


def weights_of(version: Version) -> dict[str, str]:
    """The version's files of weights → SHA-256. Raises as `fetch` does."""
    known = {Path(name): digest for name, digest in checksums(version).items()}
    return {file.name: digest for file, digest in known.items() if file.suffix == ".safetensors"}
