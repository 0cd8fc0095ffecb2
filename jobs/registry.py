"""Drafters in MLflow's model registry: found, fetched, made champion. `register.py` registers them.

A version belongs to the MLflow run of the pipeline that registered it, and its files are artifacts of that
run: `hf_model/`, which plain `from_pretrained` loads, and `evidence/`, by which the gate judges it. One
version of a model is its champion. The alias says which, and moves by `promote` and `rollback` alone.
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

from jobs.tracking_store import RAY_JOB, tracking_problem
from pipeline.artifacts import file_sha256
from pipeline.config_errors import hide_credentials
from pipeline.errors import BadData, Incomplete
from pipeline.evidence import Evidence, load_evidence

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHAMPION_BEFORE, NOBODY = "champion", "champion_before", "nobody"
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
    if problem is None and uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        problem = "there is no such file; name the store with --tracking-uri"
    if problem:
        raise Incomplete(f"MLflow at {hide_credentials(uri)}: {problem}")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except MlflowException as error:
        raise Incomplete(hide_credentials(f"MLflow at {uri}: {error.message}")) from error


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
        names = ", ".join(sorted(one.name for one in client.search_registered_models()))
        raise BadData(f"the registry has no model {model!r}; it has {names or 'none'}") from None


def number_by_run(client: MlflowClient, model: str, reference: str) -> int | None:
    """What the pipeline's run of this id, or of the Ray job of this id, has registered; None if nothing."""
    if not re.fullmatch(r"[\w.-]+", reference):
        return None
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for query in (f"attributes.run_id = '{reference}'", f"tags.{RAY_JOB} = '{reference}'"):
        for run in client.search_runs(experiments, query):
            if f"{REGISTERED}.{model}" in run.data.tags:
                return int(run.data.tags[f"{REGISTERED}.{model}"])
    return None


def to_version(uri: str, found: ModelVersion) -> Version:
    return Version(uri, found.name, int(found.version), found.run_id, found.tags)


def evidence_of(version: Version) -> Evidence:
    """By which a version is judged. Errors as of `fetch`."""
    with TemporaryDirectory() as temporary:
        return load_evidence(fetch(version, EVIDENCE, Path(temporary)))


def pull(version: Version, folder: Path) -> Path:
    """Fetch a version's Hugging Face folder, whole or not at all; returns its absolute path.

    Raises:
        BadData: if `folder` holds something, or a file is damaged.
        Incomplete: if MLflow is out of reach.
    """
    folder = folder.expanduser().resolve()
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
        BadData: if a file is missing or damaged.
        Incomplete: if MLflow is out of reach.
    """
    with registry(version.uri) as client:
        checksums = Path(client.download_artifacts(version.run_id, f"{EVIDENCE}/{CHECKSUMS}", str(into)))
        if file_sha256(checksums) != version.tags.get("checksums"):
            raise BadData(f"{version}: its {CHECKSUMS} is damaged; register the drafter anew")
        known = json.loads(checksums.read_text(encoding="utf-8"))
        client.download_artifacts(version.run_id, part, str(into))
    checksums.unlink()
    for name, digest in known.items():
        if name.startswith(f"{part}/") and not (
            (into / name).is_file() and file_sha256(into / name) == digest
        ):
            raise BadData(f"{version}: {name} is damaged or missing in MLflow; register the drafter anew")
    return into / part


# ── the champion ──────────────────────────────────────────────────────────────────────────────────


def champion_of(uri: str, model: str | None = None) -> Version | None:
    """The present champion of a model (None: the only one); None if there is none yet."""
    with registry(uri) as client:
        model = model or only_model(client)
        has = CHAMPION in aliases_of(client, model)
    return resolve(uri, model, CHAMPION) if has else None


def promote(version: Version, gate: Path) -> int | None:
    """Make a version the champion; returns the number of the version that it replaces.

    Args:
        gate: the gate's `gate.json`, which must say that this version passes against the present champion,
            or that there is none yet.

    Raises:
        BadData: if it does not.
        Incomplete: if MLflow is out of reach.
    """
    try:
        told = json.loads(gate.read_text(encoding="utf-8"))
        verdict = told["verdict"]
        model, candidate = told["model"], told["candidate"]["version"]
        # Without a champion there is no baseline; results that no registry holds are one without a version.
        baseline = None if told["baseline"] is None else told["baseline"]["version"] or "of no registry"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(f"{gate} is no gate.json of `budgetdraft gate` ({error!r})") from None
    if verdict != "pass":
        raise BadData(f"{gate} says {verdict!r}: only what passes the gate is promoted")
    if (model, candidate) != (version.model, version.number):
        raise BadData(f"{gate} is about {model} version {candidate}, not about {version}")
    with registry(version.uri) as client:
        champion = aliases_of(client, version.model).get(CHAMPION)
        if champion == version.number:
            raise BadData(f"{version} is the champion already")
        if baseline != champion:
            raise BadData(
                f"{gate} compares with version {baseline or 'none'}, but the champion of {version.model} is "
                f"{champion or 'none'}: run the gate again"
            )
        number = str(version.number)
        client.set_model_version_tag(version.model, number, CHAMPION_BEFORE, str(champion or NOBODY))
        client.set_model_version_tag(version.model, number, "gate", f"{verdict} against {baseline or NOBODY}")
        move_champion(client, version.model, champion, version.number)
    return champion


def rollback(uri: str, model: str | None = None) -> tuple[int, int]:
    """Make the version that the champion replaced the champion again; returns both numbers, old and new.

    Raises:
        BadData: if there is none before it.
        Incomplete: if MLflow is out of reach.
    """
    with registry(uri) as client:
        model = model or only_model(client)
        champion = aliases_of(client, model).get(CHAMPION)
        if champion is None:
            raise BadData(f"{model} has no champion")
        versions = {int(v.version): v for v in client.search_model_versions(f"name = '{model}'")}
        before = versions[champion].tags.get(CHAMPION_BEFORE, NOBODY)
        if before == NOBODY:
            raise BadData(f"{model} version {champion} is the first champion: there is none to go back to")
        if int(before) not in versions:
            raise BadData(f"{model} version {before}, the champion before {champion}, was deleted")
        move_champion(client, model, champion, int(before))
        # Or two that replaced each other would be gone back and forth between.
        client.delete_model_version_tag(model, str(champion), CHAMPION_BEFORE)
    return champion, int(before)


def move_champion(client: MlflowClient, model: str, expected: int | None, number: int) -> None:
    """Set the alias. MLflow cannot compare and set, so the look at who has it comes right before."""
    champion = aliases_of(client, model).get(CHAMPION)
    if champion != expected:
        raise Incomplete(
            f"the champion of {model} became version {champion} meanwhile: look at it, then try again"
        )
    client.set_registered_model_alias(model, CHAMPION, str(number))
