"""The facts that `budgetdraft plan` starts from: shapes of the models, and counts of the data.

Once stage prepare is complete, the counts are exact. Before, training sequences are estimated from the sizes
of local files, and test prompts from the sizes of local documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.stages.prepare import open_prepare, prepared_elsewhere
from jobs.stages.teach import answer_tasks, label_tasks
from pipeline.axes import Place
from pipeline.config.data import Data
from pipeline.config.models import FirstLayers, Head, PretrainedModel, Role, ScratchModel
from pipeline.config.schema import Config
from pipeline.data.documents import Reader
from pipeline.data.prepare import plan_prompts
from pipeline.data.sources.registry import make_readers
from pipeline.data.tokenizer import check_tokenizers, in_a_folder, read_tokenizer
from pipeline.errors import BadData
from pipeline.models.check import check_role
from pipeline.models.hub import config_here
from pipeline.plan.shapes import Shape, shape_of, shapes_of
from pipeline.store.artifacts import Artifact
from pipeline.store.layout import TOKENIZER

NO_CAP = Data.model_fields["max_sequences"].default
Readers = dict[str, Reader[Any]]


@dataclass(frozen=True)
class Facts:
    """Counts of the data: exact, from the manifest of stage prepare, or estimated.

    `how` says which, and `prompts_how` says it for the prompts. `prepared` is the stage's folder if the stage
    is complete.
    """

    sequences: int
    labelled: int
    answers: int
    prompts: dict[Place, int]  # of the test split
    prompts_how: str
    vocab: int
    how: str
    prepared: Artifact | None = None


def known(config: Config) -> tuple[dict[Role, Shape], Facts]:
    """The shapes of target and drafter, and the facts of the data.

    Raises:
        BadData: if a local source or a model's config is missing, a model cannot be run on the config's
            texts, or models in folders do not fit together.
    """
    for role, spec in config.models.items():  # reported before the data are read
        if isinstance(spec, PretrainedModel):
            config_here(spec, role)
        check_role(config, role, weights=False)
    if all(
        isinstance(spec, ScratchModel | FirstLayers | Head) or in_a_folder(spec)
        for spec in config.models.values()
    ):
        check_tokenizers(config)  # `facts_of` asks too, but goes on where a source is on the hub
    facts = facts_of(config, shape_of(config, "target", config.data.tokenizer.vocab_size).vocab)
    return shapes_of(config, facts.vocab), facts


# ── models ────────────────────────────────────────────────────────────────────────────────────────


# ── data ──────────────────────────────────────────────────────────────────────────────────────────


def facts_of(config: Config, vocab: int) -> Facts:
    """Exact counts of a complete stage prepare; else estimates for a vocabulary of `vocab` entries.

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
        answers = estimate_answers(config, readers, vocab)
        return Facts(sequences, labelled, answers, *estimate_prompts(config, readers, vocab), vocab, how)
    counts = prepared.manifest["counts"]
    labelled = sum(task.last - task.first for task in label_tasks(config, prepared))
    asked = sum(task.last - task.first for task in answer_tasks(config, prepared))
    prompts = {
        Place(task.reader.source.name, task.context.name): counts["prompts"][task.file]
        for task in plan_prompts(config.data, readers, [])
        if task.split == "test"
    }
    vocab = len(read_tokenizer(prepared.path / TOKENIZER))
    answers = asked * config.labels.answers.per_prompt
    return Facts(counts["sequences"], labelled, answers, prompts, "exact", vocab, "exact", prepared)


def bytes_per_token(vocab: int) -> float:
    """A vocabulary's entries hold about log2(V) / 4 bytes of text: 2.2 at 512, 2.8 at 2K, 4.2 at 128K."""
    return math.log2(vocab) / 4


def estimate_sequences(config: Config, readers: Readers, vocab: int) -> tuple[int, str]:
    """Training sequences, from the sizes of the local source files, and what the number is based on."""
    data, train, per_token = config.data, config.train, bytes_per_token(vocab)
    training = [reader for reader in readers.values() if "train" in reader.source.use]
    for name in (reader.source.name for reader in training if reader.on_hub):
        if data.max_sequences < NO_CAP:
            return data.max_sequences, f"assumed: data.max_sequences, as {name} is on the hub"
        how = f"assumed: what train.steps read, as {name} is on the hub and no cap is set"
        return train.steps * train.batch_sequences, how
    sequences = int(sum(reader.estimate_sequences(per_token) for reader in training))
    return min(sequences, data.max_sequences), f"estimate: file sizes at {per_token:.2f} bytes a token"


def estimate_answers(config: Config, readers: Readers, vocab: int) -> int:
    """The most answers that sources which ask can give, from the sizes of their files."""
    most, per_token = config.data.sequence_tokens - config.train.learned_tokens, bytes_per_token(vocab)
    asked = 0
    for reader in readers.values():
        if not reader.answered or "train" not in reader.source.use:
            continue
        for context, count in reader.training_contexts(most):
            asked += min(
                count, config.data.max_sequences, int(reader.estimate_texts(per_token, context.tokens))
            )
    return asked * config.labels.answers.per_prompt


def estimate_prompts(config: Config, readers: Readers, vocab: int) -> tuple[dict[Place, int], str]:
    """Test prompts of every place, and what the numbers are based on.

    Local sources are read until they give enough prompts.

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
    kinds = sorted({reader.on_hub for reader in tested})
    return prompts, "; on the hub ".join(how[on_hub] for on_hub in kinds)
