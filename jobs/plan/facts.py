"""The facts that `budgetdraft plan` starts from: shapes of the models, and counts of the data.

Once stage prepare is complete, the counts are exact; before, the sources estimate them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jobs.stages.prepare import open_prepare, prepared_elsewhere
from jobs.stages.teach import answer_tasks, label_tasks
from pipeline.axes import Place
from pipeline.config.models import PretrainedModel, Role
from pipeline.config.schema import Config
from pipeline.data.estimate import estimate_answers, estimate_prompts, estimate_sequences
from pipeline.data.prepare import plan_prompts
from pipeline.data.sources.registry import make_readers
from pipeline.data.tokenizer import check_tokenizers, in_a_folder, read_tokenizer
from pipeline.errors import BadData
from pipeline.models.check import check_role
from pipeline.models.hub import config_here
from pipeline.models.shape import Shape, shape_of, shapes_of
from pipeline.store.artifacts import Artifact
from pipeline.store.layout import TOKENIZER


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
    pretrained = {role: spec for role, spec in config.models.items() if isinstance(spec, PretrainedModel)}
    for role in config.models:  # reported before the data are read
        if role in pretrained:
            config_here(pretrained[role], role)
        check_role(config, role, weights=False)
    if all(map(in_a_folder, pretrained.values())):
        check_tokenizers(config)  # `facts_of` asks too, but goes on where a source is on the hub
    facts = facts_of(config, shape_of(config, "target", config.data.tokenizer.vocab_size).vocab)
    return shapes_of(config, facts.vocab), facts


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
        task.place: counts["prompts"][task.file]
        for task in plan_prompts(config.data, readers, [])
        if task.split == "test"
    }
    vocab = len(read_tokenizer(prepared.path / TOKENIZER))
    answers = asked * config.labels.answers.per_prompt
    return Facts(counts["sequences"], labelled, answers, prompts, "exact", vocab, "exact", prepared)
