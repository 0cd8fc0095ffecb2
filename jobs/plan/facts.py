"""What `budgetdraft plan` goes by: shapes of the models, and what the data hold.

With a finished stage prepare its counts are exact; before, training sequences are estimated from the sizes of
local files, and test prompts from those of local documents.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.stages.prepare import prepared_elsewhere
from jobs.stages.teach import label_tasks
from pipeline.axes import Place
from pipeline.config.data import AnySource, Data
from pipeline.config.models import AnyModel, PretrainedModel, ScratchModel
from pipeline.config.schema import Config
from pipeline.data.documents import Document, Reader
from pipeline.data.prepare import distinct, local_files, stage_inputs
from pipeline.data.prompts import places
from pipeline.data.reading import BadRow, looks_local
from pipeline.data.sources.registry import make_readers
from pipeline.data.tokenizer import check_tokenizers, read_tokenizer
from pipeline.errors import BadData
from pipeline.models.load import ModelRef, own_positions
from pipeline.plan.shapes import Shape, pretrained_shape, scratch_shape
from pipeline.store.artifacts import Artifact, open_artifact
from pipeline.store.layout import TOKENIZER
from pipeline.train.teacher import LabelTask

COMPRESSED, EXPANSION = {".gz", ".parquet", ".zip"}, 2.5  # text in files of these kinds, to its size there
NO_CAP = Data.model_fields["max_sequences"].default
Readers = dict[str, Reader[Any]]


@dataclass(frozen=True)
class Facts:
    """What is known of the data: from the manifest of stage prepare, or estimated.

    `how` says which, as `prompts_how` does for the prompts. `prepared` is the stage's folder where it is
    complete.
    """

    sequences: int
    labelled: int
    prompts: dict[Place, int]  # of the test split
    vocab: int
    how: str
    prompts_how: str
    prepared: Artifact | None = None


def known(config: Config) -> tuple[dict[str, Shape], Facts]:
    """The shapes of target and drafter, and the facts of the data.

    Raises:
        BadData: if a local source or a model's config is missing.
    """
    shapes = shapes_of(config, config.data.tokenizer.vocab_size)
    facts = facts_of(config, shapes["target"].vocab)
    return shapes_of(config, facts.vocab), facts


def shapes_of(config: Config, vocab: int) -> dict[str, Shape]:
    return {role: shape_of(config, role, vocab) for role in ("target", "drafter")}


def shape_of(config: Config, role: str, vocab: int) -> Shape:
    """A model's shape; `vocab` is the tokenizer's, which a scratch model takes for its own."""
    spec: AnyModel = getattr(config, role)
    if isinstance(spec, ScratchModel):
        return scratch_shape(spec, vocab)
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = config_folder(spec, role)
    try:
        given = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(given, trust_remote_code=spec.trust_remote_code)
        return pretrained_shape(given, sum(weight.numel() for weight in model.parameters()))
    except (OSError, ValueError, AttributeError) as error:
        raise BadData(f"{role}.path = {spec.path}: its config.json cannot be used: {error}") from error


def config_folder(spec: PretrainedModel, role: str) -> Path:
    """Where a model's config.json is, without asking the hub.

    Raises:
        BadData: if it is not on this machine.
    """
    from huggingface_hub import try_to_load_from_cache

    file: object = Path(spec.path) / "config.json"
    if not Path(spec.path).is_dir():
        if not spec.may_be_on_hub:
            raise BadData(f"{role}.path = {spec.path}: there is no such folder")
        file = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
    if not isinstance(file, str | Path) or not Path(file).exists():
        raise BadData(
            f"{role}.path = {spec.path}: its config.json is not on this machine. Download it "
            f"(`hf download {spec.path} config.json`) or name a local folder in {role}.path"
        )
    return Path(file).parent


def beyond_positions(config: Config) -> list[str]:
    """Of each model that has to read more positions than it is built for, the fields that ask for them.

    Models of which the config scales RoPE are left out: that is for such contexts.
    """
    data, found = config.data, []
    asked = {"data.sequence_tokens": data.sequence_tokens} | {
        f"data.contexts.{one.name}.tokens + data.max_new_tokens": one.tokens + data.max_new_tokens
        for one in data.contexts
    }
    for role in ("target", "drafter"):
        spec: AnyModel = getattr(config, role)
        if isinstance(spec, ScratchModel):
            reach = spec.max_positions
        else:
            folder = str(config_folder(spec, role))
            trusted = spec.trust_remote_code
            reach = own_positions(ModelRef(folder, trust_remote_code=trusted))
        beyond = [f"{field} ({tokens:,})" for field, tokens in asked.items() if tokens > reach]
        if beyond and not spec.rope_scaling:
            found.append(
                f"{role} is built for {reach:,} positions, and {', '.join(beyond)} ask for more: lower them, "
                f"or set {role}.rope_scaling"
            )
    return found


def facts_of(config: Config, vocab: int) -> Facts:
    """Exact counts of a complete stage prepare; else estimates for a vocabulary of so many entries."""
    data = config.data
    readers = {} if data.prepared else make_readers(data, config.seed)
    prepared = prepared_data(config, readers)
    if prepared is None:
        sequences, how = estimate_sequences(config, readers, vocab)
        labelled = min(sequences, config.labels.max_sequences)
        prompts, prompts_how = estimate_prompts(config, readers, vocab)
        return Facts(sequences, labelled, prompts, vocab, how, prompts_how)
    counts = prepared.manifest["counts"]
    labelled = sum(t.last - t.first for t in label_tasks(config, prepared) if isinstance(t, LabelTask))
    prompts = {
        Place(source.name, context.name): counts["prompts"][f"test-{source.name}-{context.name}.jsonl"]
        for source in data.sources
        if "test" in source.use
        for context in data.contexts
    }
    vocab = len(read_tokenizer(prepared.path / TOKENIZER))
    return Facts(counts["sequences"], labelled, prompts, vocab, "exact", "exact", prepared)


def prepared_data(config: Config, readers: Readers) -> Artifact | None:
    """The complete stage prepare of a config, found as `jobs.stages.prepare` finds it; nothing is written.

    Raises:
        BadData: if a local source or tokenizer is missing, unless another source is on the hub.
    """
    if config.data.prepared is not None:
        return prepared_elsewhere(config, Path(config.data.prepared))
    try:
        check_tokenizers(config)
        shards = [shard for reader in readers.values() for shard in reader.shards()]
        inputs = stage_inputs(config, local_files(readers, shards))
    except BadData:
        if not any(on_hub(config, source) for source in config.data.sources):
            raise
        return None
    artifact = open_artifact(Path(config.storage), "prepare", inputs)
    return artifact if artifact.complete else None


def on_hub(config: Config, source: AnySource) -> bool:
    """Whether a source is read from the hub, so that nothing is known of its size."""
    path = getattr(source, "path", None)
    return path is not None and not looks_local(path, Path(config.data.root))


def bytes_per_token(vocab: int) -> float:
    """A vocabulary's entries hold about log2(V) / 4 bytes of text: 2.2 at 512, 2.8 at 2K, 4.2 at 128K."""
    return math.log2(vocab) / 4


def estimate_sequences(config: Config, readers: Readers, vocab: int) -> tuple[int, str]:
    """Training sequences by the sizes of the local source files, and what that rests on."""
    data = config.data
    per_token = bytes_per_token(vocab)
    sequences = 0.0
    for reader in readers.values():
        source = reader.source
        if "train" not in source.use:
            continue
        if on_hub(config, source):
            if data.max_sequences < NO_CAP:
                return data.max_sequences, f"assumed: data.max_sequences, as {source.name} is on the hub"
            wanted = config.train.steps * config.train.batch_sequences
            return wanted, f"assumed: what train.steps read, as {source.name} is on the hub and no cap is set"
        shards = [shard for shard in reader.shards() if shard.split in (None, "train")]
        share = 1.0
        if source.kind == "text":
            share -= source.validation_fraction * ("validation" in source.use)
            share -= source.test_fraction * ("test" in source.use)
        for path in {table.path for shard in shards for table in shard.tables}:
            text = os.path.getsize(path) * (EXPANSION if Path(path).suffix in COMPRESSED else 1)
            # What is left at the end of a document is not used; files of text are documents.
            found = text / per_token / data.sequence_tokens
            sequences += share * (math.floor(found) if source.kind == "text" else found)
    return min(int(sequences), data.max_sequences), f"estimate: file sizes at {per_token:.2f} bytes a token"


def estimate_prompts(config: Config, readers: Readers, vocab: int) -> tuple[dict[Place, int], str]:
    """Test prompts of every place, and what that rests on: local sources are read until there are enough.

    Raises:
        BadData: if a local file is missing.
    """
    data, rests_on = config.data, set()
    prompts: dict[Place, int] = {}
    for reader in readers.values():
        source = reader.source
        if "test" not in source.use:
            continue
        if on_hub(config, source):
            counts = {context.name: data.prompts for context in data.contexts}
            rests_on.add("at most: data.prompts")
        else:
            counts = local_prompts(reader, bytes_per_token(vocab))
            rests_on.add(f"estimate: test documents at {bytes_per_token(vocab):.2f} bytes a token")
        prompts |= {Place(source.name, context): count for context, count in counts.items()}
    return prompts, "; on the hub ".join(sorted(rests_on, reverse=True))


def local_prompts(reader: Reader[Any], per_token: float) -> dict[str, int]:
    """Test prompts of a local source by context, were its text to have so many bytes a token."""
    data = reader.data
    counts = {context.name: 0 for context in data.contexts}
    for document in distinct(test_documents(reader), Counter()):
        tokens = int(len((document.before + document.text + document.after).encode()) / per_token)
        for context, found in prompts_of(reader, tokens).items():
            counts[context] = min(data.prompts, counts[context] + found)
        if min(counts.values()) == data.prompts:
            break
    return counts


def test_documents(reader: Reader[Any]) -> Iterator[Document]:
    for shard in reader.shards():
        for row in reader.documents(shard) if shard.split in (None, "test") else ():
            if not isinstance(row, BadRow) and row.split == "test":
                yield row


def prompts_of(reader: Reader[Any], tokens: int) -> dict[str, int]:
    """Prompts that a document of so many tokens gives at each context, as its reader makes them."""
    source, data = reader.source, reader.data
    if source.kind == "prompts":  # whole, at the first context that is long enough
        smallest = min((c.tokens for c in data.contexts if c.tokens >= tokens), default=0)
        return {context.name: int(context.tokens == smallest) for context in data.contexts}
    in_pieces = reader.continues_text or (source.kind == "lwm" and source.task != "summary")
    most = data.prompts_per_document if in_pieces else 1
    return {context.name: len(places(tokens, context.tokens, most)) for context in data.contexts}
