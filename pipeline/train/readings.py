"""What models read in the stages pretrain, teach, train and improve, without validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pipeline.axes import Place
from pipeline.config.models import Head, Role
from pipeline.config.schema import Config
from pipeline.config.train import Variant
from pipeline.models.shape import Reading
from pipeline.sweep.grid import texts


def pretrain_readings(config: Config, role: Role) -> Iterator[Reading]:
    """Of a scratch model: pieces of sequences."""
    spec = config.scratch[role].pretrain
    piece = spec.sequence_tokens or config.data.sequence_tokens
    yield Reading(role, spec.steps * spec.batch_sequences * piece, piece / 2, training=True)


def teach_readings(
    config: Config, labelled: int, answers: int, prompts: Mapping[Place, int]
) -> Iterator[Reading]:
    """The target reads labelled sequences, in part its own text, and writes answers and continuations.

    Args:
        labelled: sequences that it labels.
        answers: that it writes to training prompts.
        prompts: of the test split.
    """
    data, labels, learned = config.data, config.labels, config.train.learned_tokens
    length = data.sequence_tokens
    yield Reading("target", labelled * length * (1 + labels.on_policy_fraction), length / 2)
    if answers:  # prompts are read once, answers are written and read again
        asked = answers / labels.answers.per_prompt
        yield Reading("target", asked * (length - learned) + 2 * answers * learned, length / 2)
    written = len(texts(config.sweep, {0.0, *config.sweep.temperatures}))  # the greedy text always is
    for place, count in prompts.items():
        tokens = data.context_tokens[place.context]
        yield Reading("target", count * written * (tokens + data.max_new_tokens), tokens / 2)


def train_readings(config: Config, variant: Variant, steps: int) -> Iterator[Reading]:
    """Of a drafter: every sequence once, and its windows with gradients behind each view."""
    train, length, headed = config.train, config.data.sequence_tokens, isinstance(config.drafter, Head)
    sequences = steps * train.batch_sequences
    yield Reading("drafter", sequences * length, length / 2)
    attended = [length / 2] if variant.full_weight else []
    if variant.sparse_weight and variant.budgets:
        attended += [float(max(variant.budgets))] * min(variant.num_views, len(variant.budgets))
    # A head runs its layer once for every proposal of a chain; nothing of a prefix is attended to.
    depth = config.chain_steps if headed else 1
    for entries in attended:
        yield Reading("drafter", sequences * train.learned_tokens * depth, entries, training=True)
    recomputed = headed and config.labels.features == "recomputed"  # what the head reads, anew each time
    if recomputed:
        yield Reading("target", sequences * length, length / 2)
    if (path := variant.path) is None or not steps:
        return
    # In every R-th step the target reads the prefixes and all paths. So does the drafter, and the paths
    # twice: it samples them, and reads them with gradients. A head does both in one.
    due = -(-steps // path.every) * train.batch_sequences
    sampled = due * train.windows * path.paths * path.length
    yield Reading("target", (1 + recomputed) * due * length, length / 2)
    yield Reading("target", sampled, length)
    yield Reading("drafter", due * length, length / 2)
    if not headed:
        yield Reading("drafter", sampled, attended[-1])
    yield Reading("drafter", sampled, attended[-1], training=True)


def improve_readings(config: Config) -> Iterator[Reading]:
    """Of a drafter that learns on in the rounds of `improve`, where there is no path term."""
    if (spec := config.improve) is None:
        return
    name = spec.drafter or config.train.drafters[-1].name
    variant = config.train.drafter_named(name).model_copy(update={"path": None})
    yield from train_readings(config, variant, spec.rounds * spec.steps)
