"""The arithmetic of a run, and the hours that it takes at a given or a measured rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pipeline.axes import Place
from pipeline.config.models import Role
from pipeline.config.schema import Config
from pipeline.models.shape import Reading, Shape
from pipeline.sweep.counts import replay_readings, timed_readings
from pipeline.train.readings import improve_readings, pretrain_readings, teach_readings, train_readings

MEASURING = "sweep measure"  # the stage, as in `pipeline.plan.sweep_memory.measure_memory`
Rates = dict[tuple[Role, bool], float]  # FLOP/s by the model's role, and whether it trains


class StageFlops(NamedTuple):
    """FLOPs of a stage by the model that does them, forward alone or with backward."""

    stage: str
    role: Role
    training: bool
    flops: float


def flops_of(stage: str, readings: Iterable[Reading], shapes: Mapping[Role, Shape]) -> Iterator[StageFlops]:
    """A backward pass is twice a forward one."""
    for role, tokens, attended, training in readings:
        forward = shapes[role].forward_flops(tokens, attended)
        yield StageFlops(stage, role, training, (1 + 2 * training) * forward)


def work(
    config: Config,
    shapes: Mapping[Role, Shape],
    labelled: int,
    answers: int,
    prompts: Mapping[Place, int],
) -> Iterator[StageFlops]:
    """All arithmetic up to replay, without validation; `prefills` has the reading of measured prompts.

    Args:
        labelled: see `teach_readings`, for the others too.
    """
    train = config.train
    for role in config.scratch:
        yield from flops_of(f"pretrain {role}", pretrain_readings(config, role), shapes)
    yield from flops_of("teach", teach_readings(config, labelled, answers, prompts), shapes)
    for variant in train.drafters:
        yield from flops_of("train", train_readings(config, variant, train.steps_of(variant)), shapes)
    yield from flops_of("sweep replay", replay_readings(config, prompts), shapes)
    yield from flops_of("improve", improve_readings(config), shapes)


def prefills(config: Config, shapes: Mapping[Role, Shape], prompts: Mapping[Place, int]) -> list[StageFlops]:
    """The reading of timed prompts."""
    return list(flops_of(MEASURING, timed_readings(config, prompts), shapes))


def hours(done: Iterable[StageFlops], rates: Rates) -> dict[str, float]:
    """Device-hours by stage."""
    total: dict[str, float] = defaultdict(float)
    for part in done:
        total[part.stage] += part.flops / rates[part.role, part.training] / 3600
    return dict(total)
