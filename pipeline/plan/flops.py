"""The arithmetic of a run, and the hours that it takes at a given or a measured rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.axes import Place
from pipeline.config.models import ScratchModel
from pipeline.config.schema import Config
from pipeline.plan.shapes import Shape
from pipeline.plan.sweep_counts import draft_sources, measured_again, picks_of, pointed_at, role_of, texts
from pipeline.store.layout import MEASURED_AGAIN
from pipeline.sweep.grid import views_of
from pipeline.sweep.picks import FASTEST_MEASURED

MEASURING = "sweep measure"  # the stage, as in `pipeline.plan.sweep_memory.measure_memory`
Rates = dict[tuple[str, bool], float]  # FLOP/s by the model's role, and whether it trains


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage by the model that does them, forward alone or with backward (three times as many)."""

    stage: str
    role: str
    training: bool
    flops: float


def work(
    config: Config, shapes: Mapping[str, Shape], labelled: int, prompts: Mapping[Place, int]
) -> list[Work]:
    """All work up to replay, validation aside; of what is measured, `prefills` has the reading.

    Args:
        labelled: sequences that the target labels.
        prompts: of the test split.
    """
    data, train, length = config.data, config.train, config.data.sequence_tokens
    target, drafter = shapes["target"], shapes["drafter"]
    done: list[Work] = []
    for role, spec in (("target", config.target), ("drafter", config.drafter)):
        if isinstance(spec, ScratchModel):
            piece = spec.pretrain.sequence_tokens or length
            tokens = spec.pretrain.steps * spec.pretrain.batch_sequences * piece
            flops = 3 * shapes[role].forward_flops(tokens, piece / 2)
            done.append(Work(f"pretrain {role}", role, True, flops))

    greedy, sampled = texts(config.sweep, config.sweep.temperatures)
    tokens_of = {context.name: context.tokens for context in data.contexts}
    read = [(tokens_of[place.context], count) for place, count in prompts.items()]
    flops = target.forward_flops(labelled * length * (1 + config.labels.on_policy_fraction), length / 2)
    for tokens, count in read:
        flops += target.forward_flops(count * (1 + sampled) * (tokens + data.max_new_tokens), tokens / 2)
    done.append(Work("teach", "target", False, flops))

    for variant in train.drafters:
        sequences = (train.steps if variant.steps is None else variant.steps) * train.batch_sequences
        attended = [length / 2] if variant.full_weight else []
        if variant.sparse_weight and variant.budgets:
            attended += [float(max(variant.budgets))] * min(variant.num_views, len(variant.budgets))
        tokens = sequences * train.windows * train.window_tokens
        windows = sum(3 * drafter.forward_flops(tokens, entries) for entries in attended)
        prefill = drafter.forward_flops(sequences * length, length / 2)
        done += [Work("train", "drafter", False, prefill), Work("train", "drafter", True, windows)]

    for source in draft_sources(config) if config.sweep.mode != "measure" else ():
        if reader := role_of(source):
            views = len(views_of(config.sweep, source)) * (greedy + sampled)
            flops = sum(
                count * shapes[reader].forward_flops(tokens + views * data.max_new_tokens, tokens / 2)
                for tokens, count in read
            )
            done.append(Work("sweep replay", reader, False, flops))
    return done


def prefills(config: Config, shapes: Mapping[str, Shape], prompts: Mapping[Place, int]) -> list[Work]:
    """The timed prompts: read by the target, by each drafter, and once more by a target that drafts; each
    time twice, as the second is timed.

    Where the fastest cells are measured again, by the target each time, and by as many of the largest
    sources as there can be cells.
    """
    tokens_of = {context.name: context.tokens for context in config.data.contexts}
    done = []
    for place, count in prompts.items():
        tokens, timed = tokens_of[place.context], min(count, config.sweep.measure.prompts)
        picks = picks_of(config, place)
        _, added = pointed_at(config, place, set(picks)) if config.sweep.predicts else (0, [])
        timed_ones = {pick.drafter for pick in picks}.union(added)
        roles = [role_of(source) for source in draft_sources(config) if source.name in timed_ones]
        each = {role: shape.forward_flops(timed * tokens, tokens / 2) for role, shape in shapes.items()}
        readers = sorted(filter(None, roles), key=lambda role: -each[role])
        reading = ["target", *readers]
        if measured_again(config.sweep):
            reading += len(MEASURED_AGAIN) * ["target", *readers[:FASTEST_MEASURED]]
        done += [Work(MEASURING, role, False, 2 * each[role]) for role in reading]
    return done


def hours(done: Iterable[Work], rates: Rates) -> dict[str, float]:
    """Device-hours by stage."""
    total: dict[str, float] = defaultdict(float)
    for part in done:
        total[part.stage] += part.flops / rates[part.role, part.training] / 3600
    return dict(total)
