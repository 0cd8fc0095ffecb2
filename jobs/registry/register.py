"""Registers a drafter of a finished pipeline: its files, its evidence, its card, once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from jobs.executors.ray_job import RAY_JOB, job_id
from jobs.mlflow_address import tracking_uri
from jobs.registry.card import accepted, model_card, shortened, tags
from jobs.registry.versions import CHECKSUMS, EVIDENCE, HF_MODEL, REGISTERED, Version, registry, to_version
from pipeline.config.schema import Config
from pipeline.gate.evidence import Evidence, evidence_of_results, open_results, save_evidence, sound_files
from pipeline.store.files import file_sha256, write_json, write_text
from pipeline.store.layout import MODEL

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

LONGEST_DESCRIPTION = 5000  # MLflow's column


def register(config: Config, report: Path, run_id: str) -> Version:
    """Register the config's drafter as it stands in a finished report, or find the version that it is.

    The same drafter in the same report is one version, whoever registers it and however often.

    Args:
        report: the report's folder or its `summary.json`.
        run_id: the pipeline's run in MLflow, which gets the files and leads to the version.

    Raises:
        BadData: if the report or what it was made from is damaged.
        Incomplete: if MLflow is out of reach; what is there already is found by the next try.
    """
    assert config.registry
    model = config.registry.model
    results = open_results(report, config.registry.drafter)
    identity = {"drafter_artifact": results.drafter.fingerprint, "report": results.report.fingerprint}
    uri = tracking_uri(config)
    with registry(uri) as client:
        create_model(client, model)
        version = first_version(client, model, identity)
        if version is None:
            evidence, cells = evidence_of_results(results), accepted(results)
            card = model_card(results, evidence, cells)
            sound_files(results.drafter, "model/")
            checksums = upload(client, run_id, results.drafter.path / MODEL, card, evidence)
            known = {"checksums": checksums} | identity | tags(results, evidence, cells)
            job = job_id()
            created = client.create_model_version(
                model,
                f"runs:/{run_id}/{HF_MODEL}",
                run_id,
                tags=known | ({RAY_JOB: job} if job else {}),
                description=shortened(card, LONGEST_DESCRIPTION),
            )
            # Another pipeline may have registered the same meanwhile: the earliest stays.
            version = first_version(client, model, identity)
            assert version is not None
            if version.version != created.version:
                client.delete_model_version(model, created.version)
        client.set_tag(run_id, f"{REGISTERED}.{model}", version.version)
        made = to_version(uri, version)
    log.info("registered: %s is %s", results.name, made)
    return made


def create_model(client: MlflowClient, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def first_version(client: MlflowClient, model: str, identity: Mapping[str, str]) -> ModelVersion | None:
    """The earliest version of a model that has these tags."""
    conditions = [f"name = '{model}'", *(f"tags.{name} = '{value}'" for name, value in identity.items())]
    results = list(client.search_model_versions(" and ".join(conditions)))
    return min(results, key=lambda version: int(version.version), default=None)


def upload(client: MlflowClient, run_id: str, model: Path, card: str, evidence: Evidence) -> str:
    """The files of a version as artifacts of a run; returns the SHA-256 of the list of their SHA-256."""
    with TemporaryDirectory() as temporary:
        created = Path(temporary)
        write_text(created / HF_MODEL / "README.md", card)
        save_evidence(evidence, created / EVIDENCE)
        files = {f"{HF_MODEL}/{file.relative_to(model)}": file for file in model.rglob("*") if file.is_file()}
        files |= {str(file.relative_to(created)): file for file in created.rglob("*") if file.is_file()}
        checksums = created / EVIDENCE / CHECKSUMS
        write_json(checksums, {name: file_sha256(file) for name, file in sorted(files.items())})
        files[f"{EVIDENCE}/{CHECKSUMS}"] = checksums
        for name, file in files.items():
            client.log_artifact(run_id, str(file), str(Path(name).parent))
        return file_sha256(checksums)
