"""The whole pipeline: prepare → pretrain → teach → train → sweep → report, with MLflow beside it.

Stage improve follows train where it is asked for, in place of sweep and report.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from jobs.executors.base import Executor
from jobs.executors.choose import NoExecutor, make_executor
from jobs.executors.ray_job import check_storage, in_ray_job
from jobs.records.record import RunRecord
from jobs.registry.register import register
from jobs.stages.improve import improve
from jobs.stages.prepare import prepare
from jobs.stages.report import ReportInputs, report
from jobs.stages.sweep import ref, sweep
from jobs.stages.teach import sample, taught, teach
from jobs.stages.train import Watch, drafters, pretrain, scratch_models, target_ref, train
from jobs.tracking.store import Run
from jobs.tracking.tracker import Tracker
from pipeline.config.run import Work
from pipeline.config.schema import Config
from pipeline.errors import BadData, ConfigError, Incomplete, disk_trouble
from pipeline.models.check import check_models
from pipeline.models.load import ModelRef, model_ref, must_be_unchanged
from pipeline.observe.training import follow
from pipeline.results.summary import Stage, Summary
from pipeline.store.artifacts import Artifact
from pipeline.store.files import read_rows
from pipeline.store.layout import CELLS, FIGURES, IMPROVE, METRICS, PAGE, SUMMARY, TOKENIZER, Until
from pipeline.store.rows import CellRow
from pipeline.store.storage import make_storage, storage_folder, with_home

log = logging.getLogger(__name__)

DRAFTERS = "drafters"  # folder of the trained models among MLflow's artifacts of stage train


class Stages:
    """Runs stages one after another, each recorded, tracked and timed; `done` says which were cached."""

    def __init__(self, config: Config, executor: Executor, tracker: Tracker, record: RunRecord) -> None:
        self.executor, self.tracker, self.record = executor, tracker, record
        # As they are now: a stage that saw other weights than the stage before would mix two targets.
        given = {role: spec for role, spec in config.models.items() if spec.kind == "pretrained"}
        self.models = [model_ref(spec, None, role) for role, spec in given.items()]
        self.done: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Run]:
        """Run a stage in the body; yields the stage's tracking run. A stage whose body never calls the
        executor was cached."""
        for model in self.models:
            must_be_unchanged(model, Path(model.path))
        began, calls = time.perf_counter(), self.executor.calls
        with self.record.stage(name) as recorded:
            with self.tracker.stage_run(name) as run:
                yield run
            seconds = round(time.perf_counter() - began, 3)
            cached = recorded.cached = self.executor.calls == calls
            self.done.append(Stage(name=name, seconds=seconds, cached=cached))
            log.info("%s: %s in %.1f s", name, "cached" if cached else "done", seconds)

    @contextmanager
    def follow(self, run: Run, files: Mapping[str, Path], upload_to: str | None = None) -> Iterator[None]:
        """While the body trains models, send rows of their metrics files to MLflow, the record and Ray."""
        with self.tracker.follow(run, files, upload_to), follow(files):
            yield


def run_pipeline(config: Config, until: Until = "report") -> Path:
    """Run the stages up to and including `until`; returns the summary, or that stage's artifact folder.

    Raises:
        BadData: if an input cannot be used.
        ConfigError: if the storage, MLflow or Ray cannot be used, or there is nothing to improve by.
        Incomplete: if cells of the sweep failed, or MLflow did not take all; the report is made all the same.
    """
    if until == IMPROVE and config.improve is None:
        raise ConfigError(
            "the config has no group improve: add `improve: {}`, or its fields, and see docs/improve.md"
        )
    config = settled(config)
    check_models(config)
    make_storage(config.storage)
    with RunRecord(config, until) as record, storage_troubles(config.storage):
        tracker = Tracker.start(config, record.folder)
        try:
            with tracker, closing(make_executor(config)) as executor:
                made = run_stages(config, until, Stages(config, executor, tracker, record))
            if config.registry and until == "report":
                register(config, made, tracker.run.known())
            return made
        finally:
            for line in tracker.links():
                log.info(line)


@contextmanager
def storage_troubles(storage: str) -> Iterator[None]:
    """Turn what befalls a storage in the body into an error for people.

    Raises:
        Incomplete: if its disk is full, or ails otherwise.
        BadData: if a file or folder belongs to somebody else.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if found := disk_trouble(error):
            trouble, advice = found
            raise Incomplete(
                f"{trouble}; the storage {storage} has {shutil.disk_usage(storage).free / 1e6:.1f} MB left. "
                f"{advice}; the same command resumes ({error})"
            ) from error
        if isinstance(error, PermissionError):
            raise BadData(
                f"{error}: who shares the storage {storage} must be able to read and write what is in it; "
                "mend the permissions, or set another storage"
            ) from error
        raise


def settled(config: Config) -> Config:
    """The config, with the values filled in that workers cannot find out for themselves.

    Folders are made absolute, since workers have working directories of their own. On Ray, `device: auto`
    follows from the GPUs that are asked for: a worker sees all GPUs of its machine, asked for or not.

    Raises:
        ConfigError: if there can be no folder `storage`; in a Ray job, if storage or a model lies in the
            job's own copy of the code; if some kinds of work ask for GPUs and others for none.
    """
    if in_ray_job() and config.run.executor == "ray":
        check_storage(config.storage)
        for role in ("target", "drafter"):
            path = getattr(getattr(config, role), "path", "/")
            if not Path(path).is_absolute() and Path(path).is_dir():
                raise ConfigError(
                    f"{role}.path = {path} is relative, and this job's working directory is a copy that goes "
                    "when it ends: give an absolute path that all nodes share, or a hub id"
                )
    data = config.data.model_copy(update={"root": str(with_home(config.data.root).resolve())})
    changes: dict[str, Any] = {"data": data, "storage": str(storage_folder(config.storage))}
    if config.run.executor == "ray" and config.run.device == "auto":
        needs = [config.run.needs(work) for work in get_args(Work) if work != "prepare"]
        device = "cuda" if any(need.gpus for need in needs) else "cpu"
        try:
            changes["run"] = type(config.run).model_validate({**config.run.model_dump(), "device": device})
        except ValidationError as error:
            raise ConfigError(f"run.device = auto: {error.errors()[0]['msg']}") from None
    models = {
        role: model.model_copy(update={"path": str(folder.resolve())})
        for role, model in (("target", config.target), ("drafter", config.drafter))
        if model.kind == "pretrained" and (folder := with_home(model.path)).is_dir()
    }
    return config.model_copy(update=changes | models)


def run_stages(config: Config, until: Until, stages: Stages) -> Path:
    executor, tracker = stages.executor, stages.tracker

    def watch(run: Run, upload_to: str | None = None) -> Watch:
        return partial(stages.follow, run, upload_to=upload_to)

    def mirror(run: Run, models: dict[str, Artifact], upload_to: str | None = None) -> None:
        """Log models that `watch` did not see trained, or that an earlier run did not get into MLflow."""
        tracker.log_models(run, {name: made.path / METRICS for name, made in models.items()}, upload_to)

    with stages.stage("prepare"):
        prepared = prepare(config, executor)
    if until == "prepare":
        return prepared.path
    with stages.stage("pretrain") as run:
        scratch = pretrain(config, executor, prepared, watch(run))
        mirror(run, scratch)
    with stages.stage("teach"):
        taught = teach(config, executor, prepared, scratch)
        sampled = sample(config, executor, prepared, scratch)
    if until == "teach":
        return taught.path
    with stages.stage("train") as run:
        trained = train(config, executor, prepared, taught, scratch, watch(run, DRAFTERS))
        mirror(run, trained, DRAFTERS)
    if until == "train":
        return trained[config.train.drafters[-1].name].path
    if until == IMPROVE:
        with stages.stage(IMPROVE) as run:
            return improve(config, executor, prepared, taught, scratch, trained, watch(run))
    with stages.stage("sweep") as sweep_run:
        swept, failures = sweep(config, executor, prepared, taught, sampled, scratch, trained)
    if until == "sweep":
        check_complete(failures, swept.path)
        return swept.path
    with stages.record.stage("report"), tracker.stage_run("report") as run:
        models = (*scratch.values(), *trained.values())
        inputs = ReportInputs(prepared, taught, swept, tuple(stages.done), models, sampled)
        reported = report(config, inputs)
        # By the report's fingerprint: a sweep that is tried again keeps its own, and gains rows.
        tracker.log_sweep(sweep_run, reported.fingerprint, read_rows(reported.path / CELLS, CellRow))
        tracker.log_files(run, [reported.path / name for name in (PAGE, SUMMARY, CELLS)])
        tracker.log_folder(run, reported.path / FIGURES, "figures")
        summary = Summary.model_validate_json((reported.path / SUMMARY).read_text(encoding="utf-8"))
        tracker.log_advice(run, summary.recommendations)
    check_complete(failures, swept.path)
    return reported.path / SUMMARY


def check_complete(failures: int, folder: Path) -> None:
    if failures:
        raise Incomplete(
            f"{failures} failures in the sweep; their errors are in "
            f"{folder / 'failed'}; the same command tries them again"
        )


@dataclass(frozen=True)
class Trained:
    """The tokenizer and the models of a finished pipeline, for decoding."""

    tokenizer: Path
    target: ModelRef
    drafters: dict[str, ModelRef]


def folders(config: Config, prepared: Artifact) -> tuple[dict[str, Artifact], Artifact, dict[str, Artifact]]:
    """Of scratch models, labels and drafters, which need not exist yet."""
    scratch, _ = scratch_models(config, prepared)
    labels, _ = taught(config, prepared, scratch)
    return scratch, labels, drafters(config, labels, scratch)[0]


def completed(config: Config) -> Trained:
    """The models of a config whose stages up to `train` are complete.

    Raises:
        BadData: if a stage is not; the text says which command to run.
    """
    config, nothing = settled(config), NoExecutor()
    if not Path(config.storage).is_dir():
        raise BadData(f"there is no storage {config.storage}; run `budgetdraft run CONFIG` first")
    prepared = prepare(config, nothing)
    scratch = pretrain(config, nothing, prepared)
    taught = teach(config, nothing, prepared, scratch)
    trained = train(config, nothing, prepared, taught, scratch)
    return Trained(
        prepared.path / TOKENIZER,
        target_ref(config, scratch),
        {name: ref(config, artifact) for name, artifact in trained.items()},
    )
