"""A toy pipeline that registers its drafter, and its store in MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.registry.register import register
from jobs.registry.versions import Version
from pipeline.config.schema import Config
from tests.helpers.toys import artifact, toy_config

MODEL = "toy-drafters"


def registered_config(corpus: Path, storage: Path, drafter: str | None = None, **tracking: Any) -> Config:
    groups = {"tracking": {"experiment": "toy", **tracking}, "registry": {"model": MODEL, "drafter": drafter}}
    return toy_config(corpus, storage, lambda values: values.update(groups))


@dataclass
class Done:
    """A finished run that has registered its drafter."""

    config: Config
    storage: Path
    uri: str

    def mlflow(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def new_run(self) -> str:
        """Another pipeline run in MLflow."""
        client = self.mlflow()
        return str(client.create_run(client.get_experiment_by_name("toy").experiment_id).info.run_id)

    def pipeline_runs(self) -> list[str]:
        """Ids, newest first."""
        client = self.mlflow()
        experiment = client.get_experiment_by_name("toy").experiment_id
        return [run.info.run_id for run in client.search_runs([experiment], "tags.stage = 'pipeline'")]

    def versions(self) -> list[int]:
        return sorted(int(v.version) for v in self.mlflow().search_model_versions(f"name = '{MODEL}'"))

    def another(self, drafter: str = "full_only") -> Version:
        config = self.config.model_copy(
            update={"registry": self.config.registry.model_copy(update={"drafter": drafter})}  # type: ignore[union-attr]
        )
        return register(config, artifact(self.storage, "report"), self.new_run())
