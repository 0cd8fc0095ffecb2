"""The arithmetic of a run, and the hours that it takes at a given or a measured rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pipeline.axes import Place
from pipeline.config.models import Head, Role
from pipeline.config.schema import Config
from pipeline.models.shape import Shape
from pipeline.store.layout import MEASURED_AGAIN
from pipeline.sweep.grid import draft_sources, texts, views_of
from pipeline.sweep.picks import FASTEST_MEASURED, measures_again, most_timed

MEASURING = "sweep measure"  # the stage, as in `pipeline.plan.sweep_memory.measure_memory`
Rates = dict[tuple[Role, bool], float]  # FLOP/s by the model's role, and whether it trains


class StageFlops(NamedTuple):
    """FLOPs of a stage by the model that does them, forward alone or with backward."""

    stage: str
    role: Role
    training: bool
    flops: float


def work(
    config: Config,
    shapes: Mapping[Role, Shape],
    labelled: int,
    answers: int,
    prompts: Mapping[Place, int],
) -> Iterator[StageFlops]:
    """All arithmetic up to replay, without validation; `prefills` has the reading of measured prompts.

    Args:
        labelled: sequences that the target labels.
        answers: that it writes to training prompts.
        prompts: of the test split.
    """

    def flops(stage: str, role: Role, tokens: float, attended: float, training: bool = False) -> StageFlops:
        """A backward pass is twice a forward one."""
        return StageFlops(
            stage, role, training, (1 + 2 * training) * shapes[role].forward_flops(tokens, attended)
        )

    data, train, sweep, length = config.data, config.train, config.sweep, config.data.sequence_tokens
    for role, spec in config.scratch.items():
        piece = spec.pretrain.sequence_tokens or length
        tokens = spec.pretrain.steps * spec.pretrain.batch_sequences * piece
        yield flops(f"pretrain {role}", role, tokens, piece / 2, training=True)

    written = len(texts(sweep, {0.0, *sweep.temperatures}))  # the greedy text always is
    read = [(data.context_tokens[place.context], count) for place, count in prompts.items()]
    yield flops("teach", "target", labelled * length * (1 + config.labels.on_policy_fraction), length / 2)
    if answers:  # prompts are read once, answers are written and read again
        asked, learned = answers / config.labels.answers.per_prompt, train.learned_tokens
        yield flops("teach", "target", asked * (length - learned) + 2 * answers * learned, length / 2)
    for tokens, count in read:
        yield flops("teach", "target", count * written * (tokens + data.max_new_tokens), tokens / 2)

    headed = isinstance(config.drafter, Head)
    for variant in train.drafters:
        sequences = train.steps_of(variant) * train.batch_sequences
        yield flops("train", "drafter", sequences * length, length / 2)
        attended = [length / 2] if variant.full_weight else []
        if variant.sparse_weight and variant.budgets:
            attended += [float(max(variant.budgets))] * min(variant.num_views, len(variant.budgets))
        for entries in attended:
            # A head runs its layer once for every proposal of a chain; nothing of a prefix is attended to.
            tokens = sequences * train.learned_tokens * (config.chain_steps if headed else 1)
            yield flops("train", "drafter", tokens, entries, training=True)

    for source in draft_sources(config) if sweep.mode != "measure" else ():
        if source.role is not None:
            rows = len(views_of(sweep, source)) * len(texts(sweep, sweep.temperatures))
            for tokens, count in read:
                new_tokens = rows * data.max_new_tokens
                yield flops("sweep replay", source.role, count * (tokens + new_tokens), tokens / 2)
                if source.baseline == "cascade":
                    yield flops("sweep replay", "drafter", count * tokens, tokens / 2)
                if headed and source.role == "drafter":  # the target reads what the head reads features of
                    yield flops("sweep replay", "target", count * tokens, tokens / 2)


def prefills(config: Config, shapes: Mapping[Role, Shape], prompts: Mapping[Place, int]) -> list[StageFlops]:
    """Reading the timed prompts: by the target, by each drafter, that of a cascade too, and once more by a
    target that drafts. Each reading is done twice, as only the second is timed.

    Where the fastest cells are measured again, the target reads the prompts each time, and so do the largest
    sources, as many as there can be cells.
    """
    done: list[StageFlops] = []
    target: Role = "target"
    for place, count in prompts.items():
        tokens, timed = config.data.context_tokens[place.context], min(count, config.sweep.measure.prompts)
        flops = {role: shape.forward_flops(timed * tokens, tokens / 2) for role, shape in shapes.items()}
        names = {cell.drafter for cell in most_timed(config, place)}
        timed_sources = [source for source in draft_sources(config) if source.name in names]
        roles: list[Role] = [source.role for source in timed_sources if source.role == "drafter"]
        roles += [target] * any(source.role == target for source in timed_sources)  # once for all of these
        roles += ["drafter" for source in timed_sources if source.baseline == "cascade"]
        readers = sorted(roles, key=lambda role: -flops[role])
        again = len(MEASURED_AGAIN) * measures_again(config.sweep)
        reading = [target, *readers, *again * [target, *readers[:FASTEST_MEASURED]]]
        done += [StageFlops(MEASURING, role, False, 2 * flops[role]) for role in reading]
    return done


def hours(done: Iterable[StageFlops], rates: Rates) -> dict[str, float]:
    """Device-hours by stage."""
    total: dict[str, float] = defaultdict(float)
    for part in done:
        total[part.stage] += part.flops / rates[part.role, part.training] / 3600
    return dict(total)
