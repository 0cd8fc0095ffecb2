"""Fetches the report of a submitted pipeline from MLflow: `python .github/fetch_report.py JOB FOLDER`.

JOB is the id that `budgetdraft submit` printed. MLFLOW_TRACKING_URI says where MLflow is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from jobs.executors.ray_job import RAY_JOB


def report_run(client: MlflowClient, job: str) -> Run:
    """The run of stage report in the pipeline of a job."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    pipelines = client.search_runs(experiments, f"tags.{RAY_JOB} = '{job}' and tags.stage = 'pipeline'")
    if not pipelines:
        raise SystemExit(f"MLflow has no run of a pipeline of job {job}")
    parent = pipelines[0].info.run_id
    stages = client.search_runs(
        experiments, f"tags.`mlflow.parentRunId` = '{parent}' and tags.stage = 'report'"
    )
    if not stages:
        raise SystemExit(f"the pipeline of job {job} has no stage report in MLflow")
    return stages[0]


if __name__ == "__main__":
    job, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient()
    print(client.download_artifacts(report_run(client, job).info.run_id, "", str(folder)))
