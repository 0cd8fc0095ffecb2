"""What a group of training workers is told to do, and each worker's side of it.

A job names several models that are trained one after another in one launch: scratch models by next-token
pretraining, or drafter variants by the two-branch loss.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kernels import dispatch
from pipeline.config.models import FirstLayers, Head, ScratchModel
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.errors import BadData
from pipeline.models.build import build_scratch
from pipeline.models.draft_vocabulary import most_frequent, read_draft_tokens, restrict
from pipeline.models.generation import ends_in, stop_tokens
from pipeline.models.heads.begin import head_of
from pipeline.models.heads.eagle import FeatureHead
from pipeline.models.hub import config_folder, model_folder
from pipeline.models.layers import freeze_around_layers
from pipeline.models.load import ModelRef, load_model, pick_device, shared_tokens
from pipeline.observe import logs
from pipeline.observe.training import read_metrics
from pipeline.store.files import read_rows
from pipeline.store.layout import (
    CONTINUATIONS,
    IMPROVE,
    LABELS,
    METRICS,
    MODEL,
    PROMPTS,
    SEQUENCES,
    TOKENIZER,
)
from pipeline.store.rows import Continuation, Prompt
from pipeline.train.batches import LabelledSequences, Shards
from pipeline.train.cards import drafter_card, scratch_card
from pipeline.train.chained_views import ChainedViews
from pipeline.train.checkpoints import step_of
from pipeline.train.engine import Engine
from pipeline.train.loop import Objective, Schedule, export, fit, write_model
from pipeline.train.objectives import MultiView, NextToken
from pipeline.train.paths import PathTerm
from pipeline.train.served import ServedViews
from pipeline.train.target.features import Features, GivenFeatures, StoredFeatures, features_file

log = logging.getLogger(__name__)

MakeEngine = Callable[[PreTrainedModel, Schedule], Engine]
Stop = Callable[[], bool] | None
Training = Callable[["TrainJob", MakeEngine, Stop], None]  # `run_job`, as executors are handed it


@dataclass(frozen=True)
class TrainJob:
    """One launch of the workers. Pretraining has no `teach` and no `drafter`.

    `outputs` maps "target" and "drafter", or variant names, to their artifact folders; `deepspeed` is the
    content of the config's settings file. `target` is for what asks it while a drafter trains. With `served`,
    a folder of served rounds, a variant learns from these in place of the labels of `teach`. `launch` is a
    unique name of this launch, for the files through which driver and workers communicate.
    """

    config: Config
    outputs: dict[str, Path]
    prepare: Path
    teach: Path | None = None
    drafter: ModelRef | None = None
    target: ModelRef | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)
    launch: str = ""
    served: Path | None = None

    @property
    def device(self) -> torch.device:
        return pick_device(self.config.run.device)


def run_job(job: TrainJob, make_engine: MakeEngine, stop: Stop = None) -> None:
    """Train every model of the job in this worker; models that are already exported are left alone.

    One follows the other, so each lets go of its engine before it loads what it exports into.

    Raises:
        NotFinite, Stopped: see `loop.fit`, which also says what `stop` is.
    """
    dispatch.choose(job.config.run.kernels)
    tokenizer = AutoTokenizer.from_pretrained(job.prepare / TOKENIZER)
    for name, folder in job.outputs.items():
        if (folder / MODEL).exists():
            continue
        with logs.item(work_item_of(job, name)):
            if job.teach is None:
                pretrain(job, name, folder, tokenizer, make_engine, stop)
            else:
                distil(job, name, folder, tokenizer, make_engine, stop)


def work_item_of(job: TrainJob, name: str) -> logs.WorkItem:
    """The work item in this worker's logs. Ray Train does not tell a worker which attempt it is."""
    stage = "pretrain" if job.teach is None else "train" if job.served is None else IMPROVE
    cell = f"{name}, rank {dist.get_rank()}" if dist.is_initialized() else name
    return logs.WorkItem(stage, cell, logs.times_begun(stage, cell) + 1)


def pretrain(
    job: TrainJob,
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    make_engine: MakeEngine,
    stop: Stop,
) -> None:
    """Next-token training of the scratch target or drafter."""
    config = job.config
    spec = config.target if name == "target" else config.drafter
    assert isinstance(spec, ScratchModel)
    # Target and drafter must not start from the same random numbers.
    seed = config.seed + (name == "drafter")
    schedule = Schedule(spec.pretrain, config.train, spec.pretrain.steps)
    model = build_scratch(spec, tokenizer, seed)
    if schedule.steps == 0:
        if is_first_worker():
            write_model(model, tokenizer, folder, scratch_card(config, spec, name, 0))
        return
    engine = make_engine(model, schedule)
    tokens = Shards(sorted((job.prepare / SEQUENCES).glob("*.npy")))
    prompts = validation_prompts(job.prepare)
    objective = NextToken(config, spec.pretrain, tokens, prompts, engine.device)
    trained = fit(engine, objective, schedule, folder, name, stop)
    first = engine.rank == 0
    engine.close()
    del engine, model, objective
    gc.collect()  # they are in circles
    if first:
        card = scratch_card(config, spec, name, step_of(trained))
        export(build_scratch(spec, tokenizer, seed), tokenizer, folder, trained, card)


def distil(
    job: TrainJob,
    name: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    make_engine: MakeEngine,
    stop: Stop,
) -> None:
    """Train one drafter variant on the target's labels, or on rounds that were served."""
    config = job.config
    assert job.teach is not None and job.drafter is not None
    variant = next(v for v in config.train.drafters if v.name == name)
    steps = config.train.steps_of(variant)

    start = job.drafter
    if variant.rope_scaling is not None:
        start = replace(start, rope_scaling=variant.rope_scaling)
    labels = (job.served or job.teach) / LABELS
    data = LabelledSequences(labels, config.labels.temperature)
    if job.served is None:
        tokens_D = proposable(config, start, tokenizer, data)
    else:
        tokens_D = read_draft_tokens(model_folder(start))
    scored_by = [start]
    if variant.path is not None and job.served is None:
        assert job.target is not None
        scored_by.append(job.target)  # of a path's tokens: neither may have logits that the other lacks
    num_tokens = shared_tokens(tokenizer, *scored_by)
    fresh: Callable[[], PreTrainedModel]
    if isinstance(config.drafter, Head):
        seed = variant.seeds[0] if variant.seeds else config.seed
        fresh = partial(new_head, config.drafter, start, num_tokens, tokens_D, seed)
    else:
        layers_alone = isinstance(config.drafter, FirstLayers)
        fresh = partial(load_drafter, start, num_tokens, tokens_D, layers_alone)
    if steps == 0:
        if is_first_worker():
            card = drafter_card(config, variant, steps, {})
            write_model(placing(fresh(), variant), tokenizer, folder, card)
        return
    schedule = Schedule(config.train, config.train, steps)
    model = fresh()
    engine = make_engine(model, schedule)
    pairs = validation_pairs(job.prepare, job.teach)
    kl_steps = config.improve.kl_steps if config.improve and job.served else None
    given = (config, variant, data, pairs, engine.device)
    objective: Objective
    if kl_steps is not None:
        objective = ServedViews(*given, labels, kl_steps)
    else:
        objective = from_labels(job, model, num_tokens, *given)
    trained = fit(engine, objective, schedule, folder, name, stop)
    first = engine.rank == 0
    engine.close()
    del engine, model, objective
    gc.collect()  # they are in circles
    if first:
        scores = {
            key.removeprefix("validation/acceptance_"): value
            for key, value in read_metrics(folder / METRICS)[-1].items()
            if key.startswith("validation/")
        }
        card = drafter_card(config, variant, steps, scores, kl_steps)
        export(placing(fresh(), variant), tokenizer, folder, trained, card)


def from_labels(
    job: TrainJob,
    model: PreTrainedModel,
    num_tokens: int,
    config: Config,
    variant: Variant,
    data: LabelledSequences,
    pairs: Sequence[tuple[Prompt, Continuation]],
    device: torch.device,
) -> MultiView:
    """What a variant learns of the target's labels, with the target beside it where it is asked more."""
    recomputed = isinstance(model, FeatureHead) and config.labels.features == "recomputed"
    target, path = None, None
    if recomputed or variant.path is not None:
        assert job.target is not None
        loaded = load_model(job.target, num_tokens, device)
        target = decode_model(loaded, config.decode.prefill_chunk)
        if variant.path is not None:
            path = PathTerm(variant.path, target, stop_tokens(loaded))
    given = (config, variant, data, pairs, device)
    if not isinstance(model, FeatureHead):
        return MultiView(*given, path)
    features = head_features(job, model, target if recomputed else None, pairs)
    return ChainedViews(*given, features, path)


def placing(model: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """Let a model's config say where its kept entries stand, for those who load it.

    A drafter that came with `rebased` and is trained otherwise no longer says so.
    """
    if variant.positions == "rebased" or hasattr(model.config, "kept_positions"):
        model.config.kept_positions = "rebased" if variant.positions == "rebased" else "true"
    return model


def load_drafter(
    start: ModelRef, num_tokens: int, tokens_D: Tensor | None = None, layers_alone: bool = False
) -> PreTrainedModel:
    """The drafter that training starts from; what training leaves alone has no gradients."""
    model = load_model(start, num_tokens, dtype="float32")
    if tokens_D is not None:
        model = restrict(model, tokens_D)
    return freeze_around_layers(model) if layers_alone else model


def new_head(
    spec: Head, target: ModelRef, num_tokens: int, tokens_D: Tensor | None, seed: int
) -> FeatureHead:
    """The head that training starts from, made of its target."""
    whole = torch.arange(num_tokens) if tokens_D is None else tokens_D
    model = load_model(target, num_tokens, dtype="float32")
    return head_of(model, whole, spec.feature_layers, seed, **spec.options)


def head_features(
    job: TrainJob,
    head: FeatureHead,
    target: DecodeModel | None,
    pairs: Sequence[tuple[Prompt, Continuation]],
) -> Features:
    """What a head reads beside its tokens: from stage teach, or from the target if one is given."""
    assert job.teach is not None
    if target is not None:
        return GivenFeatures(target, head.config.feature_layers)
    return StoredFeatures(job.teach / LABELS, [features_file(job.teach, prompt) for prompt, _ in pairs])


def proposable(
    config: Config, start: ModelRef, tokenizer: PreTrainedTokenizerBase, data: LabelledSequences
) -> Tensor | None:
    """The draft vocabulary: the most frequent labels and what ends texts; or that of the starting folder.

    Raises:
        BadData: if its size does not fit the vocabulary or the stored labels.
    """
    folder, size = model_folder(start), config.train.draft_vocabulary
    if size is None:
        tokens_D = read_draft_tokens(folder)
        if tokens_D is not None and len(tokens_D) < 2 * config.labels.top_k:
            raise BadData(
                f"the draft vocabulary of {start.path!r} has {len(tokens_D)} tokens: labels.top_k may be "
                "half of that at most"
            )
        return tokens_D
    num_tokens = shared_tokens(tokenizer, start)
    folders = [folder, config_folder(config.target.path) if config.target.kind == "pretrained" else None]
    ends = {tokenizer.eos_token_id, *(end for one in folders if one for end in ends_in(one))} - {None}
    return most_frequent(data.counts(num_tokens), size, [token for token in ends if token < num_tokens])


def validation_prompts(prepare: Path) -> list[Prompt]:
    files = sorted((prepare / PROMPTS).glob("validation-*.jsonl"))
    return [prompt for file in files for prompt in read_rows(file, Prompt)]


def is_first_worker() -> bool:
    """Whether this worker writes for its group; a model that is not trained has no engine to ask."""
    return not dist.is_initialized() or dist.get_rank() == 0


def validation_pairs(prepare: Path, teach: Path) -> list[tuple[Prompt, Continuation]]:
    """Validation prompts with the target's continuations."""
    files = sorted((teach / CONTINUATIONS).glob("validation-*.jsonl"))
    continuations = [row for file in files for row in read_rows(file, Continuation)]
    return list(zip(validation_prompts(prepare), continuations, strict=True))
