"""What a server did with a registered drafter, kept in MLflow beside the drafter."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from jobs.registry.versions import Version, registry
from pipeline.errors import BadData
from pipeline.gate.evidence import Results
from pipeline.serving.judged import ServerCheck

SERVED = "served"  # folder of artifacts, prefix of metrics, and tag of the version


def must_be_of(version: Version, results: Results) -> None:
    """Raises BadData if a version is another drafter than the one of these results."""
    if version.tags.get("drafter_artifact") != results.drafter.fingerprint:
        raise BadData(
            f"{version} is {version.tags.get('drafter')} of another training than {results.name} of "
            f"{results.report.path}: name the version that came of it"
        )


def attach(version: Version, check: ServerCheck, folder: Path) -> str:
    """Add a check's files to the version's run, and its figures to the run's metrics; returns their folder.

    Checks of the same version stay side by side. The version's tag `served` holds the last verdict.

    Raises:
        Incomplete: if MLflow is out of reach.
    """
    now = datetime.now(UTC)
    place = f"{SERVED}/{now:%Y%m%dT%H%M%SZ}"
    figures = {
        "acceptance": check.served and check.served.mean,
        "replayed_acceptance": check.replayed and check.replayed.mean,
        "difference": check.difference and check.difference.mean,
        "tokens_per_s": check.tokens_per_s,
        "speedup": check.speedup and check.speedup.mean,
    }
    with registry(version.uri) as client:
        for file in sorted(folder.glob("check.*")):
            client.log_artifact(version.run_id, str(file), place)
        for name, value in figures.items():
            if value is not None:
                client.log_metric(version.run_id, f"{SERVED}/{name}", value, step=int(now.timestamp()))
        client.set_model_version_tag(version.model, str(version.number), SERVED, check.verdict)
    return place
