"""What MLflow holds after a run, read back with its own client from a real sqlite store."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
import yaml

from jobs import Terminated
from jobs.tracking.tracker import Tracker
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.intervals import Interval
from pipeline.metrics import Departure
from pipeline.observe import logs, training
from pipeline.store.provenance import provenance
from tests.helpers.clock import wait_for
from tests.helpers.configs import MINIMAL
from tests.helpers.tracking import cell, timed, write_rows

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the whole file, as making its tables takes seconds; each test has its experiment."""
    folder = tmp_path_factory.mktemp("odd") / "100% of #1, ä;b [x]"
    folder.mkdir()
    return folder


@pytest.fixture
def config(storage: Path, request: pytest.FixtureRequest) -> Config:
    group = {"enabled": True, "experiment": request.node.name}
    return Config.model_validate(MINIMAL | {"storage": str(storage), "tracking": group})


@pytest.fixture
def client(storage: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{storage}/mlflow.db")


def runs_by_name(client: MlflowClient, config: Config) -> dict[str, Run]:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    named = {run.info.run_name: run for run in runs}
    assert len(named) == len(runs), "no run is there twice"
    return named


def curve(client: MlflowClient, run: Run, name: str) -> dict[int, float]:
    points = client.get_metric_history(run.info.run_id, name)
    assert len({p.step for p in points}) == len(points), "no step is there twice"
    return {p.step: p.value for p in points}


def test_pipeline_and_stage_runs(config: Config, client: MlflowClient, storage: Path) -> None:
    figure = storage / "figure.txt"
    figure.write_text("a figure")
    (storage / "model/below").mkdir(parents=True, exist_ok=True)
    (storage / "model/below/weights").write_text("w")
    with Tracker.start(config) as tracker, tracker.stage_run("report") as report:
        tracker.log_files(report, [figure])
        tracker.log_folder(report, storage / "model", "model")
    runs = runs_by_name(client, config)
    top, stage = runs["minimal"], runs["report"]
    assert top.info.status == stage.info.status == "FINISHED"
    assert top.data.tags["stage"] == "pipeline"
    assert stage.data.tags["stage"] == "report"
    assert stage.data.tags["mlflow.parentRunId"] == top.info.run_id
    assert top.data.tags["git_commit"] == (provenance()["git_sha"] or "unknown")
    assert top.data.params == {"seed": "42", "train_steps": "2", "executor": "inline"}
    read = Path(client.download_artifacts(stage.info.run_id, "model/below/weights"))
    assert read.read_text() == "w" and len(list((storage / "mlartifacts").rglob("weights"))) == 1
    assert list(storage.parent.iterdir()) == [storage], "nothing is made beside it"
    artifacts = {f.path for f in client.list_artifacts(stage.info.run_id)}
    assert artifacts == {"figure.txt", "model"}
    assert [f.path for f in client.list_artifacts(stage.info.run_id, "model/below")] == [
        "model/below/weights"
    ]
    found = list((storage / "mlartifacts").rglob("config.yaml"))
    assert any(Config.model_validate(yaml.safe_load(file.read_text())) == config for file in found)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (Terminated, "KILLED"), (SystemExit, "FAILED")],
)
def test_status_follows_the_exception(
    config: Config, client: MlflowClient, error: type[BaseException], status: str, tmp_path: Path
) -> None:
    metrics = tmp_path / "drafter-x/metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text('{"step": 1, "loss/total": 2.0}\n')
    with (
        pytest.raises(error),
        Tracker.start(config) as tracker,
        tracker.stage_run("train") as run,
        tracker.follow(run, {"x": metrics}),
    ):
        raise error
    runs = runs_by_name(client, config)
    assert {name: run.info.status for name, run in runs.items()} == {
        "minimal": status,
        "train": status,
        "x": status,
    }


def test_curves_are_followed_live(
    config: Config, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "POLL_S", 0.05)
    files = {name: tmp_path / f"drafter-{name}-1/metrics.jsonl" for name in ("a", "b", "never")}
    rows = [{"step": step, "loss/total": 1 / step, "train/lr": 0.1} for step in range(10, 60, 10)]
    with (
        Tracker.start(config) as tracker,
        logs.at(logs.WorkItem(stage="train")),
        tracker.stage_run("train") as stage,
        tracker.follow(stage, files),
        training.follow(files),
    ):
        write_rows(files["a"], rows[:2], torn='{"step": 30, "lo')

        def two_points() -> bool:
            runs = runs_by_name(client, config)
            return "a" in runs and len(curve(client, runs["a"], "loss/total")) == 2

        wait_for(two_points, "two points of the curve were there")
        # A resumed run drops rows behind its checkpoint and writes them again.
        write_rows(files["a"], rows[:1])
        time.sleep(0.2)
        write_rows(files["a"], rows, torn='{"step"')
        write_rows(files["b"], [{"step": 5, "validation/acceptance_b16": 0.5}])
    runs = runs_by_name(client, config)
    assert set(runs) == {"minimal", "train", "a", "b"}
    assert runs["a"].data.tags["mlflow.parentRunId"] == runs["train"].info.run_id
    assert curve(client, runs["a"], "loss/total") == {step: 1 / step for step in range(10, 60, 10)}
    assert curve(client, runs["b"], "validation/acceptance_b16") == {5: 0.5}
    assert runs["a"].info.status == "FINISHED"
    # The same files again, as when the stage was cached: their curves are there already.
    with Tracker.start(config) as tracker, tracker.follow(tracker.run, files):
        pass
    with Tracker.start(config) as tracker:
        tracker.log_models(tracker.run, files)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id], "tags.stage = 'curves'")) == 2


def test_more_points_than_one_request_takes(config: Config, client: MlflowClient, tmp_path: Path) -> None:
    rows = [{"step": step, **{f"loss/{k}": step + k / 10 for k in range(8)}} for step in range(300)]
    write_rows(tmp_path / "pretrain/metrics.jsonl", rows)
    files = {"target": tmp_path / "pretrain/metrics.jsonl"}
    with Tracker.start(config) as tracker, tracker.follow(tracker.run, files):
        pass
    run = runs_by_name(client, config)["target"]
    assert curve(client, run, "loss/7") == {step: step + 0.7 for step in range(300)}


def test_sweep_runs(config: Config, client: MlflowClient) -> None:
    rows = [
        cell(),
        cell(gamma=8, acceptance=Interval(0.4, 0.3, 0.5)),
        timed(1.5, peak_memory_bytes=7),
        timed(1.25, gamma=8),
        cell(control="other_prompt"),
        cell(budget="full", temperature=0.5, seed=3),
    ]
    with Tracker.start(config) as tracker, tracker.stage_run("sweep") as stage:
        tracker.log_sweep(stage, "abc123", rows)
    links = tracker.links()
    runs = runs_by_name(client, config)
    names = {
        "multi_view|chunk_topk|b256|4K|pg19",
        "multi_view|chunk_topk|b256|4K|pg19|other_prompt",
        "multi_view|chunk_topk|bfull|4K|pg19|t0.5|s3",
    }
    assert set(runs) == names | {"minimal", "sweep"}
    run = runs["multi_view|chunk_topk|b256|4K|pg19"]
    assert run.data.params == {
        "drafter": "multi_view",
        "dataset": "pg19",
        "context": "4K",
        "policy": "chunk_topk",
        "budget": "256",
        "control": "none",
        "threshold": "0.0",
        "temperature": "0.0",
        "seed": "0",
    }
    assert run.info.status == "FINISHED" and run.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
    assert (run.data.tags["stage"], run.data.tags["sweep_id"]) == ("cell", "abc123")
    # Acceptance of all prompts, from replay; speed of the measured ones.
    assert curve(client, run, "accept/rate") == {4: 0.5, 8: 0.4}
    assert curve(client, run, "accept/rate_low") == {4: 0.4, 8: 0.3}
    assert curve(client, run, "speed/speedup") == {4: 1.5, 8: 1.25}
    assert curve(client, run, "speed/speedup_high") == {4: 1.6, 8: 1.35}
    assert curve(client, run, "quality/exact_share") == {4: 0.75, 8: 0.75}
    assert curve(client, run, "quality/looping_share") == {4: 0.1, 8: 0.1}
    assert curve(client, run, "mem/peak_bytes") == {4: 7}
    assert curve(client, run, "position/conditional_acceptance") == {1: 0.6, 2: 0.5, 3: 0.4, 4: 0.3}
    assert (run.data.metrics["speed/best_speedup"], run.data.metrics["speed/best_gamma"]) == (1.5, 4)
    assert not {"accept/rate_not_looping", "speed/end_to_end_speedup"} & run.data.metrics.keys()
    assert "speed/speedup" not in runs["multi_view|chunk_topk|bfull|4K|pg19|t0.5|s3"].data.metrics

    start, this, sweep, compare = map(unquote, links)
    assert start.startswith("start the MLflow UI: mlflow ui --backend-store-uri 'sqlite:////")
    assert this.endswith(f"/runs/{runs['minimal'].info.run_id}")
    assert "searchFilter=tags.sweep_id = 'abc123'" in sweep and "metrics.`speed/best_speedup`" in sweep
    ids = json.loads(compare.split("runs=")[1].split("&")[0])
    assert ids[0] == run.info.run_id and set(ids) == {runs[name].info.run_id for name in names}


def test_points_of_a_lossy_rule_are_marked_and_compared_with_none(
    config: Config, client: MlflowClient
) -> None:
    departure = Departure(100, 60, 3, 100, 20, -150.0, 100, -100.0)
    rows = [timed(1.5), timed(9.0, rule="dropmatch", departure=departure)]
    with Tracker.start(config) as tracker, tracker.stage_run("sweep") as stage:
        tracker.log_sweep(stage, "lossy1", rows)
    *_, compare = map(unquote, tracker.links())
    runs = runs_by_name(client, config)
    exact = runs["multi_view|chunk_topk|b256|4K|pg19"]
    lossy = runs["multi_view|chunk_topk|b256|4K|pg19|dropmatch"]
    assert lossy.data.tags["lossy"] == "dropmatch, lossy: the text is not the target's own"
    assert lossy.data.params["rule"] == "dropmatch"
    assert curve(client, lossy, "quality/same_as_ar_share") == {4: 0.6}
    assert "lossy" not in exact.data.tags and "rule" not in exact.data.params
    assert json.loads(compare.split("runs=")[1].split("&")[0]) == [exact.info.run_id]


def test_sweep_is_mirrored_once(config: Config, client: MlflowClient) -> None:
    rows = [cell(), cell(drafter="full_only")]
    with Tracker.start(config) as tracker:
        tracker.log_sweep(tracker.run, "once", rows[:1])
    # A process that was killed between making a run and finishing it leaves this behind.
    tags = {"stage": "cell", "sweep_id": "once", "cell_key": "left behind"}
    ours = {"storage_id": tracker.store.storage}
    left = client.create_run(tracker.store.experiment_id, run_name="left behind", tags=tags | ours)
    # What another storage with the same config writes at this moment is not to be touched.
    other = client.create_run(tracker.store.experiment_id, run_name="elsewhere", tags=tags)
    with Tracker.start(config) as tracker:
        tracker.log_sweep(tracker.run, "once", rows)
        tracker.log_sweep(tracker.run, "once", rows)
    query = "tags.sweep_id = 'once' and attributes.status = 'FINISHED'"
    found = client.search_runs([tracker.store.experiment_id], query)
    assert set(json.loads(unquote(tracker.links()[-1]).split("runs=")[1].split("&")[0])) == {
        run.info.run_id for run in found
    }
    assert sorted(run.data.params["drafter"] for run in found) == ["full_only", "multi_view"]
    assert client.get_run(left.info.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(other.info.run_id).info.lifecycle_stage == "active"


def test_what_mlflow_refuses_is_named_and_the_rest_is_there(
    config: Config, client: MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path / "one/metrics.jsonl", [{"step": 1, "no: such? name": 1.0}])
    write_rows(tmp_path / "two/metrics.jsonl", [{"step": 1, "loss": 2.0}])
    with Tracker.start(config) as tracker:
        tracker.log_models(tracker.run, {name: tmp_path / name / "metrics.jsonl" for name in ("one", "two")})
    assert "MLflow refuses curves of one" in caplog.text and "no: such? name" in caplog.text
    assert curve(client, runs_by_name(client, config)["two"], "loss") == {1: 2.0}


def test_disabled_tracking_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Config.model_validate(MINIMAL | {"storage": str(tmp_path)})
    with caplog.at_level(logging.INFO), Tracker.start(config) as tracker:
        files = {"a": tmp_path / "drafter-a-1/metrics.jsonl"}
        write_rows(files["a"], [{"step": 1, "loss/total": 2.0}])
        with tracker.stage_run("train") as run, tracker.follow(run, files, "drafters"):
            tracker.log_models(run, files, "drafters")
            tracker.log_sweep(run, "x", [cell()])
            tracker.log_files(tracker.run, [files["a"]])
            tracker.log_folder(tracker.run, files["a"].parent, "a")
        assert tracker.writer.left == 0
    assert tracker.links() == []
    assert "MLflow is off" in caplog.text
    assert list(tmp_path.iterdir()) == [files["a"].parent]


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("http://ann:pa55@127.0.0.1:9", "no server answers"),
        ("/tmp/mlruns", "plain folders"),
        ("sqlite+nodriver:////tmp/x.db", "NoSuchModuleError"),
        ("nothing://127.0.0.1", "unsupported URI"),
    ],
)
def test_unusable_store(tmp_path: Path, uri: str, part: str) -> None:
    config = Config.model_validate(MINIMAL | {"storage": str(tmp_path), "tracking": {"uri": uri}})
    with pytest.raises(ConfigError, match=part) as caught:
        Tracker.start(config)
    assert "tracking.enabled=false" in str(caught.value) and "pa55" not in str(caught.value)


def test_deleted_experiment(config: Config, client: MlflowClient) -> None:
    with Tracker.start(config) as tracker:
        pass
    client.delete_experiment(tracker.store.experiment_id)
    with pytest.raises(ConfigError, match="mlflow experiments restore"):
        Tracker.start(config)
