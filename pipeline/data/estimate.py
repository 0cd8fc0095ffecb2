"""How many sequences, answers and prompts the sources will give, by the sizes of local files and documents.

Of the hub nothing is known before it is read: there the caps of the config are assumed.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.axes import Place
from pipeline.config.data import Data
from pipeline.config.schema import Config
from pipeline.data.documents import Reader
from pipeline.data.prepare import plan_asked

NO_CAP = Data.model_fields["max_sequences"].default
Readers = dict[str, Reader[Any]]


def bytes_per_token(vocab: int) -> float:
    """A vocabulary's entries hold about log2(V) / 4 bytes of text: 2.2 at 512, 2.8 at 2K, 4.2 at 128K."""
    return math.log2(vocab) / 4


def estimate_sequences(config: Config, readers: Readers, vocab: int) -> tuple[int, str]:
    """Training sequences, and what the number is based on."""
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
    """The most answers that the target can be asked for."""
    per_token, tasks = bytes_per_token(vocab), plan_asked(config, readers, [], {})
    given = (task.reader.estimate_texts(per_token, task.context.tokens) for task in tasks)
    asked = sum(min(task.count, int(texts)) for task, texts in zip(tasks, given, strict=True))
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
