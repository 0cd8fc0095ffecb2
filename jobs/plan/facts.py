"""What `budgetdraft plan` goes by: shapes of the models, and what the data hold.

With a finished stage prepare its counts are exact; before, training sequences are estimated from the sizes of
local files, and test prompts from those of local documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM

from jobs.stages.prepare import open_prepare, prepared_elsewhere
from jobs.stages.teach import label_tasks
from pipeline.axes import Place
from pipeline.config.data import Data
from pipeline.config.models import PretrainedModel, Role, ScratchModel
from pipeline.config.schema import Config
from pipeline.data.documents import Reader
from pipeline.data.prepare import plan_prompts
from pipeline.data.sources.registry import make_readers
from pipeline.data.tokenizer import read_tokenizer
from pipeline.errors import BadData
from pipeline.models.load import ModelRef, own_positions
from pipeline.plan.shapes import Shape, scratch_shape, shape_of_model
from pipeline.store.artifacts import Artifact
from pipeline.store.layout import TOKENIZER
from pipeline.train.teacher import LabelTask

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
    prompts_how: str
    vocab: int
    how: str
    prepared: Artifact | None = None


def known(config: Config) -> tuple[dict[Role, Shape], Facts]:
    """The shapes of target and drafter, and the facts of the data.

    Raises:
        BadData: if a local source or a model's config is missing.
    """
    for role, spec in config.models.items():
        if isinstance(spec, PretrainedModel):
            config_folder(spec, role)  # a model that is not there is said before the data are looked at
    facts = facts_of(config, shape_of(config, "target", config.data.tokenizer.vocab_size).vocab)
    return shapes_of(config, facts.vocab), facts


# ── models ────────────────────────────────────────────────────────────────────────────────────────


def shapes_of(config: Config, vocab: int) -> dict[Role, Shape]:
    return {role: shape_of(config, role, vocab) for role in config.models}


def shape_of(config: Config, role: Role, vocab: int) -> Shape:
    """A model's shape; `vocab` is the tokenizer's, which a scratch model takes for its own."""
    spec = config.models[role]
    if isinstance(spec, ScratchModel):
        shape = scratch_shape(spec, vocab)
    else:
        folder, trusted = config_folder(spec, role), spec.trust_remote_code
        try:
            given = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            with torch.device("meta"):
                shape = shape_of_model(AutoModelForCausalLM.from_config(given, trust_remote_code=trusted))
        except (OSError, ValueError, AttributeError) as error:
            raise BadData(f"{role}.path = {spec.path}: its config.json cannot be used: {error}") from error
    return replace(shape, itemsize=getattr(torch, spec.dtype).itemsize)


def config_folder(spec: PretrainedModel, role: Role) -> Path:
    """Where a model's config.json is, without asking the hub.

    Raises:
        BadData: if it is not on this machine.
    """
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
        f"data.contexts.{name}.tokens + data.max_new_tokens": tokens + data.max_new_tokens
        for name, tokens in data.context_tokens.items()
    }
    for role, spec in config.models.items():
        if isinstance(spec, ScratchModel):
            reach = spec.max_positions
        else:
            folder = str(config_folder(spec, role))
            reach = own_positions(ModelRef(folder, trust_remote_code=spec.trust_remote_code))
        beyond = [f"{field} ({tokens:,})" for field, tokens in asked.items() if tokens > reach]
        if beyond and not spec.rope_scaling:
            found.append(
                f"{role} is built for {reach:,} positions, and {', '.join(beyond)} ask for more: lower them, "
                f"or set {role}.rope_scaling"
            )
    return found


# ── data ──────────────────────────────────────────────────────────────────────────────────────────


def facts_of(config: Config, vocab: int) -> Facts:
    """Exact counts of a complete stage prepare; else estimates for a vocabulary of so many entries.

    Raises:
        BadData: if a local source or tokenizer is missing, unless another source is on the hub.
    """
    readers, prepared = make_readers(config.data, config.seed), None
    try:
        elsewhere = config.data.prepared
        prepared = prepared_elsewhere(config, Path(elsewhere)) if elsewhere else open_prepare(config).artifact
    except BadData:
        if elsewhere or not any(reader.on_hub for reader in readers.values()):
            raise
    if prepared is None or not prepared.complete:
        sequences, how = estimate_sequences(config, readers, vocab)
        labelled = min(sequences, config.labels.max_sequences)
        return Facts(sequences, labelled, *estimate_prompts(config, readers, vocab), vocab, how)
    counts = prepared.manifest["counts"]
    labelled = sum(t.last - t.first for t in label_tasks(config, prepared) if isinstance(t, LabelTask))
    prompts = {
        Place(task.reader.source.name, task.context.name): counts["prompts"][task.file]
        for task in plan_prompts(config.data, readers, [])
        if task.split == "test"
    }
    vocab = len(read_tokenizer(prepared.path / TOKENIZER))
    return Facts(counts["sequences"], labelled, prompts, "exact", vocab, "exact", prepared)


def bytes_per_token(vocab: int) -> float:
    """A vocabulary's entries hold about log2(V) / 4 bytes of text: 2.2 at 512, 2.8 at 2K, 4.2 at 128K."""
    return math.log2(vocab) / 4


def estimate_sequences(config: Config, readers: Readers, vocab: int) -> tuple[int, str]:
    """Training sequences by the sizes of the local source files, and what that rests on."""
    data, train, per_token = config.data, config.train, bytes_per_token(vocab)
    training = [reader for reader in readers.values() if "train" in reader.source.use]
    for name in (reader.source.name for reader in training if reader.on_hub):
        if data.max_sequences < NO_CAP:
            return data.max_sequences, f"assumed: data.max_sequences, as {name} is on the hub"
        how = f"assumed: what train.steps read, as {name} is on the hub and no cap is set"
        return train.steps * train.batch_sequences, how
    sequences = int(sum(reader.estimate_sequences(per_token) for reader in training))
    return min(sequences, data.max_sequences), f"estimate: file sizes at {per_token:.2f} bytes a token"


def estimate_prompts(config: Config, readers: Readers, vocab: int) -> tuple[dict[Place, int], str]:
    """Test prompts of every place, and what that rests on: local sources are read until there are enough.

    Raises:
        BadData: if a local file is missing.
    """
    per_token, at_most = (
        bytes_per_token(vocab),
        dict.fromkeys(config.data.context_tokens, config.data.prompts),
    )
    tested = [reader for reader in readers.values() if "test" in reader.source.use]
    prompts = {
        Place(reader.source.name, context): count
        for reader in tested
        for context, count in (at_most if reader.on_hub else reader.estimate_prompts(per_token)).items()
    }
    how = {True: "at most: data.prompts", False: f"estimate: test documents at {per_token:.2f} bytes a token"}
    return prompts, "; on the hub ".join(how[where] for where in sorted({one.on_hub for one in tested}))
