"""Stage prepare: documents in; packed training sequences, evaluation prompts and the tokenizer out.

Only the wiring is here; the computations are in `pipeline/data`.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.executors.ray_job import in_ray_job
from pipeline.config.schema import Config
from pipeline.data.decontaminate import find_contaminated, index_evaluation
from pipeline.data.documents import Reader, Shard, bad_row_counts, find_copies, read_shard
from pipeline.data.packing import encode_part, pack, plan_packing, remove_pieces
from pipeline.data.prepare import (
    check_prompts,
    local_files,
    origins,
    plan_asked,
    plan_prompts,
    settings,
    stage_inputs,
    write_prompts,
)
from pipeline.data.sources.registry import make_readers
from pipeline.data.tokenizer import check_tokenizers, sample_text, save_new_tokenizer, save_target_tokenizer
from pipeline.errors import BadData
from pipeline.observe.events import Opened, tell
from pipeline.store.artifacts import FORMAT, Artifact, open_artifact
from pipeline.store.layout import DOCUMENTS, MANIFEST, TOKENIZER
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from jobs.executors.base import Executor


def prepare(config: Config, executor: Executor) -> Artifact:
    """The prepared data of a config; a complete artifact is reused, a half-made one is resumed.

    Raises:
        BadData: if a source is missing, has too many bad rows, or leaves nothing to train on or to evaluate;
            if target and drafter cannot share a tokenizer.
    """
    if config.data.prepared is not None:
        return prepared_elsewhere(config, Path(config.data.prepared))
    sources = open_prepare(config)
    with sources.artifact.claim() as unfinished:
        if unfinished:
            read_and_pack(config, executor, sources)
    return sources.artifact


class Sources(NamedTuple):
    """The data to read, and the artifact to make of them, which need not exist yet."""

    readers: dict[str, Reader[Any]]
    shards: list[Shard]
    files: dict[str, list[Path]]
    inputs: dict[str, Any]
    artifact: Artifact


def open_prepare(config: Config) -> Sources:
    """Find the sources of a config; nothing is read or written."""
    check_tokenizers(config)
    readers = make_readers(config.data, config.seed)
    shards = [shard for reader in readers.values() for shard in reader.shards()]
    files = local_files(readers, shards)
    if in_ray_job():
        check_shared([file for source_files in files.values() for file in source_files])
    inputs = stage_inputs(config, readers, files)
    return Sources(readers, shards, files, inputs, open_artifact(Path(config.storage), "prepare", inputs))


def prepared_elsewhere(config: Config, folder: Path) -> Artifact:
    """The finished stage prepare of `data.prepared`, under the fingerprint that it was made with.

    Raises:
        BadData: if it is not finished, is damaged, has other settings, or is of an earlier program that read
            the sources otherwise; the text names the fields or sources.
    """
    name = f"data.prepared = {folder}"
    artifact = Artifact(with_home(folder).resolve(), "prepare", "")
    if in_ray_job():
        check_shared([artifact.path])
    if not artifact.complete:
        raise BadData(f"{name}: there is no {MANIFEST}; give the folder that `budgetdraft prepare` printed")
    if bad := artifact.damaged():
        raise BadData(f"{name}: damaged or missing: {', '.join(bad[:5])}; copy the folder again")
    manifest = artifact.manifest
    given, made = json.loads(json.dumps(settings(config))), manifest["inputs"]
    if manifest["stage"] != artifact.stage or manifest["format"] != FORMAT:
        raise BadData(f"{name} is of stage {manifest['stage']}, format {manifest['format']}: prepare it anew")
    differ = [f"data.{field}" for field in given["data"] if given["data"][field] != made["data"].get(field)]
    differ += ["seed"] if given["seed"] != made["seed"] else []
    if given.get("answer_tokens") != made.get("answer_tokens"):
        differ.append("train.windows × train.window_tokens")
    if differ:
        raise BadData(
            f"{name} was made with other settings of {', '.join(differ)}: prepare it with this config"
        )
    read = made.get("readers", {})
    readers = make_readers(config.data, config.seed)
    if older := [source for source, reader in readers.items() if read.get(source, 1) < reader.version([])]:
        raise BadData(
            f"{name} is of an earlier version of this program, which read the sources {', '.join(older)} "
            "otherwise: prepare it anew"
        )
    tell(Opened(artifact.path))
    return replace(artifact, fingerprint=manifest["fingerprint"])


def check_shared(files: list[Path]) -> None:
    """Raise BadData if a job reads data from its copy of the code: the next job has another copy."""
    working_folder = Path.cwd().resolve()
    for file in files:
        if file.resolve().is_relative_to(working_folder):
            raise BadData(
                f"{file.resolve().relative_to(working_folder)} lies in the working directory that is sent "
                "with a Ray job: give data on an absolute path that all nodes share, with data.root or in "
                "the sources"
            )


def read_and_pack(config: Config, executor: Executor, sources: Sources) -> None:
    """Everything from documents to prompts, into the artifact."""
    start, data = time.monotonic(), config.data
    readers, shards, files, inputs, artifact = sources
    folder, documents, tokenizer = artifact.path, artifact.path / DOCUMENTS, artifact.path / TOKENIZER
    if data.tokenizer.kind == "target":
        save_target_tokenizer(config, tokenizer)

    reading = [(readers[shard.source], shard) for shard in shards]
    by_shard = {
        (shard.source, shard.key): summary
        for (_, shard), summary in executor.map(partial(read_shard, documents), reading, "read documents")
    }
    # Tasks end in any order; what follows goes by the shards' order.
    summaries = [by_shard[shard.source, shard.key] for shard in shards]
    rows = bad_row_counts(summaries, data.max_bad_fraction)
    parts = [part for summary in summaries for part in summary.parts]
    training = [part for part in parts if part.split == "train"]
    evaluation = [part for part in parts if part.split != "train"]

    answered = {name for name, reader in readers.items() if reader.answered}
    copies = find_copies(training, answered)
    index_evaluation(documents, evaluation)
    contaminated = {
        result.file: result.dropped
        for _, result in executor.map(partial(find_contaminated, documents), training, "decontaminate")
    }
    dropped = {p.file: copies.get(p.file, set()) | contaminated[p.file].keys() for p in training}
    if data.tokenizer.kind == "bpe":
        save_new_tokenizer(config, tokenizer, sample_text(documents, training, dropped))

    continued = [part for part in training if part.source not in answered]
    items = [(part, dropped[part.file]) for part in continued]
    encoded = {
        part.file: part
        for _, part in executor.map(partial(encode_part, folder, data.sequence_tokens), items, "encode")
    }
    plans = plan_packing([encoded[part.file] for part in continued], data.max_sequences)
    num_dropped, num_too_short = (
        sum(map(len, dropped.values())),
        sum(p.num_too_short for p in encoded.values()),
    )
    if not plans and any("train" in r.source.use and not r.answered for r in readers.values()):
        raise BadData(
            f"no training document gives a sequence of data.sequence_tokens ({data.sequence_tokens}): "
            f"{num_dropped} were dropped as copies or evaluation data, {num_too_short} are too short"
        )
    num_sequences = sum(n for _, n in executor.map(partial(pack, folder), plans, "pack sequences"))

    asked = plan_asked(config, readers, training, dropped)
    tasks = plan_prompts(data, readers, parts)
    writing = executor.map(partial(write_prompts, folder), asked + tasks, "make prompts")
    made = {summary.file: summary for _, summary in writing}
    check_prompts(asked + tasks, made)

    remove_pieces(folder)
    read: dict[str, Counter[str]] = {name: Counter() for name in readers}
    for part in parts:
        read[part.source][part.split] += len(part.documents)
    counts = {
        "sources": origins(readers, files),
        "documents": read,
        "rows": rows,
        "copies": sum(map(len, copies.values())),
        "contaminated": sum(map(len, contaminated.values())),
        "too_short_for_a_sequence": num_too_short,
        "sequences": num_sequences,
        "prompts": {task.file: made[task.file].num_prompts for task in tasks},
        "prompt_documents": {task.file: made[task.file].num_documents for task in tasks},
        "skipped_documents": {task.file: made[task.file].skipped for task in asked + tasks},
    }
    if asked:
        counts["asked"] = {task.file: made[task.file].num_prompts for task in asked}
    artifact.finish(inputs, counts, time.monotonic() - start)
