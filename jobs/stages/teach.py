"""Stage teach: labels of the training sequences, greedy continuations of the evaluation prompts."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.executors.base import Executor
from jobs.stages.train import model_identity, target_ref
from pipeline.config.models import Head
from pipeline.config.schema import Config
from pipeline.data.tokenizer import read_tokenizer
from pipeline.decode.sampling import Chance
from pipeline.kv.guides import chunk_kind
from pipeline.models.generation import stop_tokens
from pipeline.models.load import ModelRef, pick_device
from pipeline.serving.writer import ServedTexts
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.layout import ASKED, LABELS, PROMPTS, SEQUENCES, TOKENIZER
from pipeline.sweep.grid import texts
from pipeline.train.batches import window_starts
from pipeline.train.target.labelling import smallest_uint
from pipeline.train.target.teacher import (
    AnswerTask,
    ContinueTask,
    LabelTask,
    TeachCounts,
    Teacher,
)
from pipeline.train.target.written import WrittenAnswers, answers_sha256

log = logging.getLogger(__name__)


def taught(
    config: Config, prepare: Artifact, scratch: dict[str, Artifact]
) -> tuple[Artifact, dict[str, Any]]:
    """The folder of the labels, which need not exist yet, and the inputs that they depend on."""
    how = {"url", "model", "requests_at_once", "timeout_s"}  # changes no text that is kept
    left_out: dict[str, Any] = {"num_workers": True, "server": how, "answers": {"written"}}
    labels = config.labels.model_dump(mode="json", exclude=left_out)
    inputs = {
        "prepare": prepare.fingerprint,
        "target": model_identity(config.target, scratch.get("target")),
        "labels": labels,
        "on_policy_tokens": config.train.learned_tokens if config.labels.on_policy_fraction else None,
        "seed": config.seed,
    }
    if config.labels.answers.written is not None:
        inputs["written"] = answers_sha256(config.labels.answers.written)
    if isinstance(config.drafter, Head):
        inputs["features"] = list(config.drafter.feature_layers or ()), config.labels.features
    if config.is_guided:
        inputs["guides"] = guides_identity(config)
    if config.sweep.refresh:
        inputs["shares"] = "of every token of a greedy continuation"
    return open_artifact(Path(config.storage), "teach", inputs), inputs


def guides_identity(config: Config) -> list[int]:
    """What the target's guides depend on: those of prompts on nothing, those of training on where windows may
    start and on how many chunks are kept."""
    train, most = config.train, config.guide_chunks
    return [most, train.window_tokens, train.windows, train.min_prefix_tokens] if most else []


def teach(config: Config, executor: Executor, prepare: Artifact, scratch: dict[str, Artifact]) -> Artifact:
    """Run the target once over everything that later stages need of it."""
    artifact, inputs = taught(config, prepare, scratch)
    with artifact.claim() as unfinished:
        if unfinished:
            label_and_continue(config, executor, prepare, scratch, artifact, inputs)
    return artifact


def label_and_continue(
    config: Config,
    executor: Executor,
    prepare: Artifact,
    scratch: dict[str, Artifact],
    artifact: Artifact,
    inputs: dict[str, Any],
) -> None:
    began = time.perf_counter()
    labelling, answering = label_tasks(config, prepare), answer_tasks(config, prepare)
    continuing = [ContinueTask(file) for file in sorted((prepare.path / PROMPTS).glob("*.jsonl"))]
    # First what a server may be asked for, so that one that is down is known at once.
    tasks: list[LabelTask | AnswerTask | ContinueTask] = [*answering, *labelling, *continuing]
    sequences, answers = (
        sum(t.last - t.first for t in labelling),
        config.labels.answers.per_prompt * sum(t.last - t.first for t in answering),
    )
    log.info(
        "teach: %d sequences, %d answers, about %.1f MB of labels, features aside → %s",
        sequences,
        answers,
        label_bytes(config, sequences, answers, len(read_tokenizer(prepare.path / TOKENIZER))) / 1e6,
        artifact.path,
    )
    if config.labels.answers.written:  # before a worker loads the target
        WrittenAnswers(config.labels.answers, read_tokenizer(prepare.path / TOKENIZER), frozenset())
    factory = partial(
        make_teacher, config, target_ref(config, scratch), prepare.path / TOKENIZER, artifact.path
    )
    counts = dict.fromkeys(asdict(TeachCounts()), 0)
    for _, done in executor.map_actors(factory, tasks, "teach", config.labels.num_workers, "teach"):
        for name in counts:
            counts[name] += getattr(done, name)
    if config.labels.server or config.labels.answers.written:
        log.info(
            "teach: there were texts for %d prompts; the target wrote its own for %d of them and %d others",
            counts["served"],
            counts["refused"],
            counts["missing"],
        )
    counts["label_bytes"] = sum(file.stat().st_size for file in (artifact.path / LABELS).glob("*.npy"))
    log.info("teach: %.1f MB of labels on disk", counts["label_bytes"] / 1e6)
    artifact.finish(inputs, counts, time.perf_counter() - began)


def sample(
    config: Config, executor: Executor, prepare: Artifact, scratch: dict[str, Artifact]
) -> Artifact | None:
    """The target's sampled continuations of the test prompts; None where the sweep is greedy alone.

    They are an artifact apart from the labels, so that other temperatures do not train drafters anew.
    """
    chances = sampled_chances(config)
    if not chances:
        return None
    inputs = {
        "prepare": prepare.fingerprint,
        "target": model_identity(config.target, scratch.get("target")),
        "chances": [[chance.temperature, chance.seed] for chance in chances],
    }
    if config.is_guided:
        inputs["guides"] = []
    artifact = open_artifact(Path(config.storage), "sample", inputs)
    with artifact.claim() as unfinished:
        if not unfinished:
            return artifact
        began = time.perf_counter()
        files = sorted((prepare.path / PROMPTS).glob("test-*.jsonl"))
        tasks = [ContinueTask(file, chance) for file in files for chance in chances]
        factory = partial(
            make_teacher, config, target_ref(config, scratch), prepare.path / TOKENIZER, artifact.path
        )
        done = executor.map_actors(factory, tasks, "sample", config.labels.num_workers, "teach")
        written = sum(result.continuations for _, result in done)
        artifact.finish(inputs, {"continuations": written}, time.perf_counter() - began)
    return artifact


def sampled_chances(config: Config) -> list[Chance]:
    """The temperatures above 0 of the sweep, with every seed."""
    return [chance for chance in texts(config.sweep, config.sweep.temperatures) if chance.temperature > 0]


def make_teacher(config: Config, target: ModelRef, folder: Path, output: Path) -> Teacher:
    teacher = Teacher(config, target, folder, output, pick_device(config.run.device))
    labels, tokenizer, eos = config.labels, teacher.tokenizer, stop_tokens(teacher.target)
    if labels.server is not None:
        teacher.engine = ServedTexts(labels.server, tokenizer, eos, int(teacher.target.num_tokens))
    elif labels.answers.written is not None:
        teacher.engine = WrittenAnswers(labels.answers, tokenizer, eos)
    return teacher


def label_tasks(config: Config, prepare: Artifact) -> list[LabelTask]:
    """One task per shard of at most `labels.sequences_per_shard` sequences.

    Beyond `labels.max_sequences`, every file gives the same share, so that every kind of document stays.
    """
    files = sorted((prepare.path / SEQUENCES).glob("*.npy"))
    counts = [len(np.load(file, mmap_mode="r")) for file in files]
    share = min(1.0, config.labels.max_sequences / max(1, sum(counts)))
    tasks: list[LabelTask] = []
    offset, size = 0, config.labels.sequences_per_shard
    for file, count in zip(files, counts, strict=True):
        wanted = int(count * share)
        for first in range(0, wanted, size):
            tasks.append(LabelTask(file, first, min(first + size, wanted), offset, len(tasks)))
        offset += count
    return tasks


def answer_tasks(config: Config, prepare: Artifact) -> list[AnswerTask]:
    """One task per shard of at most `labels.sequences_per_shard` answers, whole prompts."""
    size = max(1, config.labels.sequences_per_shard // config.labels.answers.per_prompt)
    tasks: list[AnswerTask] = []
    for file in sorted((prepare.path / ASKED).glob("*.jsonl")):
        count = sum(1 for line in file.read_bytes().splitlines() if line)
        for first in range(0, count, size):
            tasks.append(AnswerTask(file, first, min(first + size, count), len(tasks)))
    return tasks


def label_bytes(config: Config, sequences: int, answers: int, vocab: int, features: int = 0) -> int:
    """Bytes of the label files, without their headers.

    Args:
        vocab: entries of the vocabulary.
        features: width of the features beside them, in half precision where they are stored.
    """
    features = 0 if config.labels.features == "recomputed" else features
    size = np.dtype(smallest_uint(vocab)).itemsize
    per_label = size + min(config.labels.top_k, vocab) * (size + 2)
    tokens = (sequences + answers) * config.data.sequence_tokens
    labels = sequences * config.data.sequence_tokens + answers * config.train.learned_tokens
    places = sequences * len(window_starts(config.train, config.data.sequence_tokens))
    ranked = (places + answers * config.train.windows) * config.guide_chunks
    guides = ranked * np.dtype(chunk_kind(config.data.sequence_tokens)).itemsize
    return tokens * (size + 2 * features) + labels * per_label + 8 * answers + guides
