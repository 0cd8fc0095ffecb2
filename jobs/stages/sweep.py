"""Stage sweep: which prompts are replayed and measured, on which workers."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

from jobs.executors.base import Executor
from jobs.stages.sweep_phases import Phases
from jobs.stages.train import drafter_ref, model_identity, target_ref
from pipeline.config.schema import Config
from pipeline.models.limits import longest_text
from pipeline.models.load import ModelRef, own_positions
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.layout import FAILED, MODEL
from pipeline.sweep.grid import Drafter, draft_sources, loaded_drafters

log = logging.getLogger(__name__)


def sweep(
    config: Config,
    executor: Executor,
    prepare: Artifact,
    teach: Artifact,
    sample: Artifact | None,
    scratch: dict[str, Artifact],
    trained: dict[str, Artifact],
) -> tuple[Artifact, int]:
    """Evaluate every drafter; returns the artifact and the number of failures.

    Replay comes first. If the config asks for predictions, single steps are timed next, and the speeds of all
    cells are predicted. Then the cells that the config names are measured and, with predictions, the best and
    the extremes of each place. Last, the fastest few of each place are measured twice more, greedily and with
    more repeats. With failures the artifact stays incomplete, and the next run tries them again.
    """
    sources = draft_sources(config)
    drafting = [source.name for source in sources if source.role == "drafter"]
    within = [name for name in loaded_drafters(config) if name not in drafting]
    inputs = {
        "teach": teach.fingerprint,
        "sample": sample.fingerprint if sample else None,
        "target": model_identity(config.target, scratch.get("target")),
        "drafters": {name: trained[name].fingerprint for name in drafting},
        # Not among the drafters: it has no rows of its own, and is no candidate.
        **({"within": {name: trained[name].fingerprint for name in within}} if within else {}),
        "drafter_dtype": config.drafter_dtype,
        "sweep": config.sweep.model_dump(mode="json", exclude={"num_evaluators"}),
        # Wall clock belongs to a device and its threads. As configured: the driver may lack the GPU that its
        # workers have.
        "device": config.run.device,
        "threads": [config.run.executor, config.run.needs("measure").cpus]
        if config.sweep.mode != "replay"
        else None,
        "kernels": config.run.kernels,
        "decode": config.decode.model_dump(mode="json"),
    }
    artifact = open_artifact(Path(config.storage), "sweep", inputs)
    with artifact.claim() as unfinished:
        if not unfinished:
            return artifact, 0
        began = time.perf_counter()
        drafters = [located(config, scratch, trained, source) for source in sources]
        target = target_ref(config, scratch)
        run = Phases(config, executor, prepare, teach, sample, artifact, target, drafters)
        run.all()
        if run.failures:
            log.error("sweep: %d failed; see %s", run.failures, artifact.path / FAILED)
        else:
            artifact.finish(inputs, {"rows": run.rows}, time.perf_counter() - began)
        return artifact, run.failures


def located(
    config: Config, scratch: dict[str, Artifact], trained: dict[str, Artifact], source: Drafter
) -> Drafter:
    """A draft source with its model, and the positions that the model was trained on."""
    if source.role is None:
        return replace(source, trained_positions=2**31)
    if source.role == "target":
        model = target_ref(config, scratch)
        reach, inner = own_positions(model), None
        if source.baseline == "cascade" and (cascade := config.sweep.cascade):
            reach = min(reach, positions(config, scratch, cascade.drafter))
            inner = ref(config, trained[cascade.drafter])
        return replace(source, ref=model, trained_positions=reach, inner=inner)
    reach, variant = positions(config, scratch, source.name), config.train.drafter_named(source.name)
    served = (variant.served_tokens or 0) if config.train.steps_of(variant) else 0
    model = ref(config, trained[source.name])
    return replace(source, ref=model, trained_positions=reach, served_positions=served)


def ref(config: Config, trained: Artifact) -> ModelRef:
    """A trained drafter; its folder holds its rope parameters already."""
    base = config.drafter_base
    trust = base.kind == "pretrained" and base.trust_remote_code
    return ModelRef(
        str(trained.path / MODEL),
        dtype=config.drafter_dtype,
        trust_remote_code=trust,
        role="drafter",
        reach=longest_text(config),
        proposes=True,
    )


def positions(config: Config, scratch: dict[str, Artifact], name: str) -> int:
    """Positions that a drafter was trained on, by its own pretraining or by ours."""
    variant, base = config.train.drafter_named(name), config.drafter_base
    if base.kind == "scratch":
        pretrain = base.pretrain
        pretrained = (pretrain.sequence_tokens or config.data.sequence_tokens) if pretrain.steps else 0
    else:
        pretrained = own_positions(drafter_ref(config, scratch))
    return max(pretrained, config.data.sequence_tokens if config.train.steps_of(variant) else 0)
