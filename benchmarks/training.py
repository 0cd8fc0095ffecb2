"""Training: our step against a paper-style step, in supervised tokens a second and in time to acceptance.

The paper-style step is what the published code does: one sequence, one window behind one prefix, the target's
labels computed in the step, and a forward pass of its own for every view.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.pairs import Pair
from benchmarks.rows import Row, interleaved, ratios, row
from pipeline.batches import LabelledSequences, draw
from pipeline.config import Config
from pipeline.config_files import load_config
from pipeline.engine import TorchEngine
from pipeline.kv import FULL, View, ViewCache, read_continuation, read_prefix, view_of
from pipeline.losses import LOSSES, TargetLabels
from pipeline.objectives import MultiView
from pipeline.teacher import label_sequences

PREFIX, WINDOW, WINDOWS = 2048, 256, 4
SECONDS = 60.0  # that paper-style training is given, validation not counted
VALIDATIONS = 6


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
    """Labelled sequences of random tokens, as long as the row asks for, held like stage teach's shards."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        length = PREFIX + WINDOWS * WINDOW
        rng = np.random.default_rng(0)
        self.rows = rng.integers(3, pair.target.num_tokens, (8, length)).astype(np.uint16)
        np.save(folder / "shard-00000.tokens.npy", self.rows)
        np.save(folder / "shard-00000.argmax.npy", self.rows)  # their cost is the same whatever they are
        self.data = LabelledSequences(folder, 1.0)


def throughput_rows(
    pair: Pair, config: Config, folder: Path, repeats: int, targets: tuple[float | None, float | None]
) -> list[Row]:
    """Supervised tokens a second at prefix 2048 and four windows of 256, without and with labels."""
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
        row(f"{name}, labels stored", ratios(seconds["paper"], seconds["ours"]), targets[0], note=note),
        row(f"{name}, labels made once", ratios(seconds["paper"], whole), targets[1]),
    ]


def time_to_equal_acceptance(pair: Pair, config: Config) -> Row:
    """Seconds of paper-style training ÷ ours, to the validation acceptance that paper-style ends at.

    Both start from the pretrained drafter, with the demo's learning rate held constant; validation is not
    counted, and the cost of our labels is: every sequence that training read, labelled once.
    """
    from jobs.executor import NoExecutor
    from jobs.pipeline import settled
    from jobs.prepare import prepare
    from jobs.teach import teach
    from jobs.train import pretrain
    from pipeline.models import ModelRef, load_model
    from pipeline.train_job import validation_pairs

    config, nothing = settled(config), NoExecutor()
    prepared = prepare(config, nothing)
    scratch = pretrain(config, nothing, prepared)
    taught = teach(config, nothing, prepared, scratch)
    drafter = load_model(ModelRef(str(scratch["drafter"].path / "model")), pair.drafter.num_tokens)
    data = LabelledSequences(taught.path / "labels", 1.0)
    validation = validation_pairs(prepared.path, taught.path)
    train, variant, device = config.train, config.train.variants[-1], torch.device("cpu")
    objective = MultiView(config, variant, data, validation, device)
    key = "validation/acceptance_b16"

    theirs, spent, step = make_engine(drafter), 0.0, 0
    curve: list[tuple[float, float]] = []
    order = np.random.default_rng(0).permutation(len(data))
    while spent < SECONDS:
        began = time.perf_counter()
        budgets = draw(variant, train, config.data.sequence_tokens, 0, step, 0).budgets
        drawn = [view_of(variant.policy, b) for b, times in budgets.items() for _ in range(times)]
        weights = [1.0, *[variant.sparse_weight / len(drawn)] * len(drawn)]
        tokens_1L = data.tokens.rows([int(order[step % len(order)])])
        paper_step(
            theirs, pair.target, tokens_1L, train.window_tokens, [FULL, *drawn], weights, train.learning_rate
        )
        spent, step = spent + time.perf_counter() - began, step + 1
        if spent >= SECONDS * (len(curve) + 1) / VALIDATIONS:
            curve.append((spent, objective.validate(theirs.model)[key]))
    level = curve[-1][1]

    ours, spent, step, reached, next_check = make_engine(drafter), 0.0, 0, 0.0, 1.0
    micros = train.batch_sequences // train.micro_batch_sequences
    while reached < level and spent < 2 * SECONDS:
        began = time.perf_counter()
        for micro in range(micros):
            loss, _ = objective.loss(ours.model, step, micro)
            ours.backward(loss / micros)
        ours.step(train.learning_rate)
        spent, step = spent + time.perf_counter() - began, step + 1
        if spent >= next_check:
            reached, next_check = objective.validate(ours.model)[key], spent + 1.0
    began = time.perf_counter()
    label_sequences(pair.target, np.asarray(data.tokens.rows(range(16))), config.labels)
    labels_s = (time.perf_counter() - began) / 16 * min(len(data), step * train.batch_sequences)
    return row(
        f"time to equal validation acceptance, paper-style ÷ ours, {pair.name}",
        [SECONDS / (spent + labels_s)],
        note=f"{100 * level:.1f} % at B = 16: {SECONDS:.0f} s against {spent:.1f} s, and {labels_s:.1f} s of "
        f"labels; ours then had {100 * reached:.1f} %",
    )


def training_rows(demo: Pair, deep: Pair, storage: str, scratch: Path, repeats: int) -> list[Row]:
    """The deep pair has the target: in the paper, too, most of a step is the target's labels."""
    settings = [
        load_config(Path(file), [f"storage={storage}"]) for file in ("conf/quickstart.yaml", "conf/deep.yaml")
    ]
    return [
        *throughput_rows(deep, settings[1], scratch, repeats, (5.0, 2.0)),
        *throughput_rows(demo, settings[0], scratch, repeats, (None, None)),
        time_to_equal_acceptance(demo, settings[0]),
    ]
