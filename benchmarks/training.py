"""Training: our step against a paper-style step, in supervised tokens a second and in time to acceptance.

The paper-style step is what the published code does: one sequence, one window behind one prefix, the target's
labels computed in the step, and a separate forward pass for every view.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.pairs import Pair
from benchmarks.rows import Row, interleaved, ratios, row
from pipeline.axes import FULL, View
from pipeline.config.files import load_config
from pipeline.config.schema import Config
from pipeline.kv.view_cache import ViewCache, read_continuation, read_prefix
from pipeline.kv.views import view_of
from pipeline.store.layout import LABELS, MODEL
from pipeline.train.batches import LabelledSequences, draw
from pipeline.train.engine import TorchEngine
from pipeline.train.losses import LOSSES, TargetLabels
from pipeline.train.objectives import MultiView
from pipeline.train.target.labelling import label_sequences

PREFIX, WINDOW, WINDOWS = 2048, 256, 4
SECONDS, VALIDATIONS = 24.0, 8  # of training on either side, and points of its curve
SEEDS = (1, 2, 3)


def paper_step(
    engine: TorchEngine,
    target: PreTrainedModel,
    tokens_1L: Tensor,
    window: int,
    views: Sequence[View],
    weights: Sequence[float],
    learning_rate: float,
) -> None:
    """One optimizer step on the last `window` tokens of one sequence."""
    start = tokens_1L.shape[1] - window - 1
    with torch.no_grad():
        logits = target(input_ids=tokens_1L[:, :-1], use_cache=False, logits_to_keep=window).logits
        labels = TargetLabels(logits[0, :, : target.num_tokens].argmax(-1))
    inputs, positions = tokens_1L[:, start:-1], torch.arange(start, start + window).unsqueeze(0)
    (full,), _ = read_prefix(engine.model, tokens_1L[:, :start], [(start, FULL)])
    for view, weight in zip(views, weights, strict=True):
        kept = copy.copy(full)
        if view is not FULL:  # each sparse view is cut out of the full cache
            kept.view, kept.layers = view, []
            for keys, values in full.layers:
                kept.cut(keys, values, keys[:, :, :0].unsqueeze(2))
        scores = read_continuation(engine.model, ViewCache([kept], window), inputs, positions)[0]
        engine.backward(weight * LOSSES["cross_entropy"](scores, labels).mean())
    engine.step(learning_rate)


def make_engine(model: PreTrainedModel) -> TorchEngine:
    return TorchEngine(
        copy.deepcopy(model).train(),
        device=torch.device("cpu"), weight_decay=0.01, clip=1.0, accumulation=1, bfloat16=False,
    )  # fmt: skip


class Long:
    """Labelled sequences of random tokens, a prefix and all windows long, held like stage teach's shards."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        length = PREFIX + WINDOWS * WINDOW
        rng = np.random.default_rng(0)
        self.rows = rng.integers(3, pair.target.num_tokens, (8, length)).astype(np.uint16)
        np.save(folder / "shard-00000.tokens.npy", self.rows)
        np.save(folder / "shard-00000.argmax.npy", self.rows)  # a label costs the same whatever its value
        self.data = LabelledSequences(folder, 1.0)


def throughput_rows(pair: Pair, config: Config, folder: Path, repeats: int) -> list[Row]:
    """Supervised tokens a second at prefix 2048 and four windows of 256, without and with labelling."""
    long = Long(pair, folder)
    variant = config.train.variants[-1]
    train = config.train.model_copy(
        update={
            "batch_sequences": 1,
            "micro_batch_sequences": 1,
            "window_tokens": WINDOW,
            "windows": WINDOWS,
            "min_prefix_tokens": PREFIX,
        }
    )
    data = config.data.model_copy(update={"sequence_tokens": long.rows.shape[1]})
    settings = config.model_copy(update={"train": train, "data": data})
    objective = MultiView(settings, variant, long.data, [], torch.device("cpu"))
    ours, theirs = make_engine(pair.drafter), make_engine(pair.drafter)
    step = iter(range(10_000))

    def our_step() -> float:
        began = time.perf_counter()
        loss, _ = objective.loss(ours.model, next(step), 0)
        ours.backward(loss)
        ours.step(1e-5)
        return (time.perf_counter() - began) / (WINDOWS * WINDOW)

    def our_labels() -> float:
        began = time.perf_counter()
        label_sequences(pair.target, long.rows[:1], settings.labels)
        return (time.perf_counter() - began) / (WINDOWS * WINDOW)

    def their_step() -> float:
        budgets = draw(variant, train, long.rows.shape[1], 0, next(step), 0).budgets
        drawn = [view_of(variant.policy, b) for b, times in budgets.items() for _ in range(times)]
        views = [FULL, *drawn]
        weights = [1.0, *[variant.sparse_weight / len(drawn)] * len(drawn)]
        tokens_1L = torch.from_numpy(long.rows[:1, : PREFIX + WINDOW + 1].astype(np.int64))
        began = time.perf_counter()
        paper_step(theirs, pair.target, tokens_1L, WINDOW, views, weights, 1e-5)
        return (time.perf_counter() - began) / WINDOW

    runs = {"ours": our_step, "labels": our_labels, "paper": their_step}
    seconds = interleaved(runs, repeats)
    whole = [a + b for a, b in zip(seconds["ours"], seconds["labels"], strict=True)]
    name = f"training ÷ paper-style step, supervised tokens/s, {pair.name}'s shapes"
    note = f"{1 / np.median(seconds['ours']):.0f} tokens/s, paper-style {1 / np.median(seconds['paper']):.0f}"
    return [
        row(f"{name}, labels stored", ratios(seconds["paper"], seconds["ours"]), 5.0, note=note),
        row(f"{name}, labels made once", ratios(seconds["paper"], whole), 2.0),
    ]


Curve = list[tuple[float, float, int]]  # (seconds of training, validation acceptance, steps)


def curve(step: Callable[[int], None], validate: Callable[[], float]) -> Curve:
    """Train for SECONDS and validate at equal intervals; the time of validation does not count."""
    points: Curve = [(0.0, validate(), 0)]
    spent, number = 0.0, 0
    while spent < SECONDS:
        began = time.perf_counter()
        step(number)
        spent, number = spent + time.perf_counter() - began, number + 1
        if spent >= SECONDS * len(points) / VALIDATIONS:
            points.append((spent, validate(), number))
    return points


def reached(points: Curve, level: float) -> tuple[float, float]:
    """Seconds and steps at which a curve first reaches a level, between validations by interpolation."""
    for (before, low, steps), (after, high, more) in pairwise(points):
        if high >= level:
            part = max(0.0, (level - low) / (high - low)) if high > low else 0.0
            return before + part * (after - before), steps + part * (more - steps)
    raise AssertionError("the level is the lower of two best ones")


def time_to_equal_acceptance(pair: Pair, config: Config) -> Row:
    """Seconds of paper-style training ÷ ours, labels included, to equal validation acceptance at B = 16.

    Both start from the pretrained drafter and train for equally long; the level is the lower of their best.
    Learning rates are constant. Ours is the config's; the paper-style rate is the better of the config's and
    a third of it, since a paper-style batch is one sequence. Each seed draws other sequences and views.
    """
    from jobs.executors.choose import NoExecutor
    from jobs.stages.pipeline import settled
    from jobs.stages.prepare import prepare
    from jobs.stages.teach import teach
    from jobs.stages.train import pretrain
    from pipeline.models.load import ModelRef, load_model
    from pipeline.train.job import validation_pairs

    config, nothing = settled(config), NoExecutor()
    prepared = prepare(config, nothing)
    scratch = pretrain(config, nothing, prepared)
    taught = teach(config, nothing, prepared, scratch)
    drafter = load_model(ModelRef(str(scratch["drafter"].path / MODEL)), pair.drafter.num_tokens)
    data = LabelledSequences(taught.path / LABELS, 1.0)
    validation = validation_pairs(prepared.path, taught.path)
    train, variant, device = config.train, config.train.variants[-1], torch.device("cpu")
    micros = train.batch_sequences // train.micro_batch_sequences

    def run(seed: int, rate: float, ours: bool) -> Curve:
        seeded = config.model_copy(update={"seed": seed})
        objective = MultiView(seeded, variant, data, validation, device)
        engine = make_engine(drafter)
        order = np.random.default_rng(seed).permutation(len(data))

        def our_step(number: int) -> None:
            for micro in range(micros):
                loss, _ = objective.loss(engine.model, number, micro)
                engine.backward(loss / micros)
            engine.step(rate)

        def their_step(number: int) -> None:
            budgets = draw(variant, train, config.data.sequence_tokens, seed, number, 0).budgets
            drawn = [view_of(variant.policy, b) for b, times in budgets.items() for _ in range(times)]
            weights = [1.0, *[variant.sparse_weight / len(drawn)] * len(drawn)]
            tokens_1L = data.tokens.rows([int(order[number % len(order)])])
            paper_step(engine, pair.target, tokens_1L, train.window_tokens, [FULL, *drawn], weights, rate)

        step = our_step if ours else their_step
        return curve(step, lambda: objective.validate(engine.model)["validation/acceptance_b16"])

    def best(points: Curve) -> float:
        return max(acceptance for _, acceptance, _ in points)

    began = time.perf_counter()
    label_sequences(pair.target, np.asarray(data.tokens.rows(range(16))), config.labels)
    label_s = (time.perf_counter() - began) / 16
    rates = (train.learning_rate, train.learning_rate / 3)
    rate = max(rates, key=lambda rate: best(run(0, rate, ours=False)))
    samples, notes = [], []
    for seed in SEEDS:
        theirs, ours = run(seed, rate, ours=False), run(seed, train.learning_rate, ours=True)
        level = min(best(theirs), best(ours))
        seconds, steps = reached(ours, level)
        labelled_s = label_s * min(len(data), steps * train.batch_sequences)
        paper_s, _ = reached(theirs, level)
        samples.append(paper_s / (seconds + labelled_s))
        notes.append(
            f"{100 * level:.1f} %: {paper_s:.1f} s against {seconds:.1f} + {labelled_s:.1f} s of labels"
        )
    name = f"time to equal validation acceptance, paper-style ÷ ours, {pair.name}"
    return row(name, samples, note="; ".join(notes))


def training_rows(demo: Pair, deep: Pair, storage: str, scratch: Path, repeats: int) -> list[Row]:
    """Rows of both pairs' shapes: the more a target costs beside its drafter, the more stored labels save."""
    settings = [
        load_config(Path(file), [f"storage={storage}"]) for file in ("conf/quickstart.yaml", "conf/deep.yaml")
    ]
    return [
        *throughput_rows(deep, settings[1], scratch, repeats),
        *throughput_rows(demo, settings[0], scratch, repeats),
        time_to_equal_acceptance(demo, settings[0]),
    ]
