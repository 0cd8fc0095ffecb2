"""The formulas of `budgetdraft plan`, by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.axes import Place
from pipeline.config.schema import Config
from pipeline.hardware import Device
from pipeline.models import shape as costs
from pipeline.models.shape import Shape
from pipeline.plan import train_memory
from pipeline.plan.flops import hours, prefills, work
from pipeline.plan.rates import rates_of, step_of
from pipeline.plan.sweep_memory import measure_memory, replay_memory
from pipeline.sweep.counts import count_sweep
from pipeline.train.sharding import Sharding
from tests.helpers.configs import MINIMAL, config_with

GPU, CPU = Device("cuda", 0), Device("cpu", 0)
DRAFTER = Shape(parameters=1000, layers=1, hidden=32, query=32, kv=16, intermediate=64, vocab=300)
TARGET = Shape(parameters=5000, layers=2, hidden=32, query=32, kv=16, intermediate=64, vocab=300)
SHAPES = {"target": TARGET, "drafter": DRAFTER}


def test_pretraining_by_hand() -> None:
    """GQA: 2 layers of 32 channels, 32 query and 16 key/value channels, 64 in the MLP."""
    peak = train_memory.pretrain_memory(config_with(), "target", TARGET, Sharding(), GPU)
    tokens = 2 * 96
    layer = 6 * 32 + 2 * 32 + 2 * 16 + 4 * 64
    assert peak.activations == tokens * 4 * (2 * layer + 2 * 64 + 2 * 32)
    assert peak.logits == 3 * tokens * 300 * 4
    assert peak.each == 16 * 5000 + peak.activations + peak.logits


def test_training_by_hand() -> None:
    """2 sequences of 96 tokens, a window of 16 behind the last 80, 32 and 16 entries of their prefixes."""
    config = config_with()
    peak = train_memory.train_memory(config, config.train.drafters[1], 2, DRAFTER, Sharding(), GPU)
    entry = 2 * 16 * 4  # keys and values of the one layer
    assert DRAFTER.kv_bytes(5) == 5 * entry
    cache = 2 * (80 + 32 + 16 + 3 * 16) * entry
    assert peak.kv == 2 * (80 + 32 + 16) * entry + cache + 2 * cache  # views, their cache, its gradients
    assert peak.logits == 3 * (2 * 3 * 16 * 300 * 4)


# ── the sweep ─────────────────────────────────────────────────────────────────────────────────────


def test_replay_by_hand() -> None:
    """Views of a prompt of 64 tokens and of another, held of two prompts; rows of 16 tokens behind them."""
    peak = replay_memory(config_with(), SHAPES, GPU)
    held = 2 * (16 + 32 + 64 + 0)
    assert peak.kv == DRAFTER.kv_bytes(held + 2 * (16 + 32 + 64) + 0 + 7 * 16)
    assert (peak.weights, peak.logits) == (2 * 4 * 1000, 2 * (7 * 16 * 300 * 4))

    config = config_with(sweep={"baselines": ["self_speculation", "prompt_lookup"], "temperatures": [0.7]})
    deep = replace(TARGET, layers=20)  # which then takes more than the drafters
    peak = replay_memory(config, {"target": deep, "drafter": DRAFTER}, GPU)
    views = 2 * 2  # policies × sparse budgets
    assert peak.kv == deep.kv_bytes(2 * 3 * (16 + 32) + views * 16)
    assert (peak.weights, peak.logits) == (4 * (2 * 1000 + 5000), 3 * (views * 16 * 300 * 4))


def test_measuring_by_hand() -> None:
    """Where speed is predicted, any budget of any drafter may be timed: 20 more slots behind each."""
    config = config_with(sweep={"mode": "both"})
    peak = measure_memory(config, SHAPES, [Place("code", "64")], GPU)
    each = (16 + 20) + (32 + 20) + (64 + 20)
    views = 16 + 32 + 64 + 0  # of one drafter at a time
    assert peak.kv == TARGET.kv_bytes(64 + 20 + 64) + DRAFTER.kv_bytes(2 * each + views)
    assert peak.weights == 4 * (2 * 1000 + 5000)
    assert peak.logits == 4 * (20 * 300 * 4)

    named = {"predict": False, "drafters": ["multi_view"], "budgets": [16]}
    peak = measure_memory(
        config_with(sweep={"mode": "both", "measure": named}), SHAPES, [Place("code", "64")], GPU
    )
    assert peak.kv == TARGET.kv_bytes(64 + 20 + 64) + DRAFTER.kv_bytes(16 + 20 + 16)


CASCADE: dict[str, Any] = {
    "mode": "both", "baselines": ["self_speculation", "cascade"], "drafters": ["full_only"],
    "cascade": {"drafter": "multi_view", "budget": 24, "gamma": 3}, "measure": {"drafters": ["full_only"]},
}  # fmt: skip


def test_a_cascade_by_hand() -> None:
    """Its middle is replayed, and timed behind the named budget. Its drafter, which is not swept, is loaded
    beside the one that is, and keeps 24 entries; both read 3 tokens beyond what others read."""
    measure = {"drafters": ["full_only"], "budgets": [32], "gammas": [4], "predict": False}
    config, place = config_with(sweep=CASCADE | {"measure": measure}), Place("code", "64")
    weights = 4 * (2 * 1000 + 5000)
    deep = replace(TARGET, layers=20)
    peak = replay_memory(config, {"target": deep, "drafter": DRAFTER}, GPU)
    views = 2 * 2
    assert peak.kv == deep.kv_bytes(2 * 3 * (16 + 32) + views * 16) + DRAFTER.kv_bytes(2 * 24)
    assert peak.weights == weights
    peak = measure_memory(config, SHAPES, [place], GPU)
    own, cascade = 32 + 20, 32 + 20 + 3
    held = 2 * 32  # of both policies, for both sources
    assert peak.kv == TARGET.kv_bytes(64 + 20 + 2 * 64 + own + cascade + held) + DRAFTER.kv_bytes(
        32 + 20 + (24 + 20 + 3) + 32
    )
    assert peak.weights == weights
    counts = count_sweep(config, {place: 2})
    assert counts.replayed == 2 * ((3 + 3 + 1) * 2 + 2 * (2 * 2) * 2)
    assert counts.measured == 2 * (1 + 2 + 2)
    # Timed prompts are read by the target, by the drafter, once more for both that draft, and by the drafter
    # within; each time twice.
    assert Counter(part.role for part in prefills(config, SHAPES, {place: 2})) == {"target": 2, "drafter": 2}


# ── hours ─────────────────────────────────────────────────────────────────────────────────────────


def test_hours_by_hand_and_from_a_measured_step() -> None:
    config = config_with(sweep={"baselines": ["self_speculation", "prompt_lookup"], "seeds": [0, 1]})
    prompts = {Place("code", "64"): 4}
    shapes = costs.shapes_of(config, 300)
    rates, _ = rates_of(config, shapes, "cpu", 2.0)
    assert rates is not None
    spent = hours(work(config, shapes, 10, 0, prompts), rates)
    target, drafter = shapes["target"], shapes["drafter"]

    def flops(tokens: int, shape: Shape, attended: int) -> int:
        return tokens * (2 * shape.parameters + 4 * shape.layers * 32 * attended)

    expected = {
        "pretrain target": 3 * flops(2 * 2 * 96, target, 48),
        "teach": flops(10 * 96, target, 48) + flops(4 * (64 + 16), target, 32),
        "sweep replay": 4 * (2 * flops(64 + 7 * 16, drafter, 32) + flops(64 + 4 * 16, target, 32)),
    }
    assert {stage: spent[stage] for stage in expected} == pytest.approx(
        {stage: value / 2e12 / 3600 for stage, value in expected.items()}
    )
    measured, how = rates_of(config, shapes, "cpu", None)
    assert measured is not None and measured.keys() == rates.keys()
    assert "measured here" in how and all(value > 0 for value in measured.values())
    step_s, how = step_of(config, 300, "cpu", None)
    assert step_s is not None and 0 < step_s < 1 and "measured here" in how
    assert step_of(config, 300, "cpu", 12.5) == (0.0125, "the given 12.5 ms")
    if not torch.cuda.is_available():
        assert rates_of(config, shapes, "cuda", None)[0] is None
        assert step_of(config, 300, "cuda", None)[0] is None


def test_the_path_term_the_target_and_rounds_are_counted() -> None:
    """In one of two steps, 4 sequences with a window each: 3 paths of 5 tokens behind 32 entries."""
    path = {"every": 2, "paths": 3, "length": 5}
    variant = {**MINIMAL["train"]["variants"][1], "path": path}
    plain = config_with()
    config = config_with(train={"variants": [MINIMAL["train"]["variants"][0], variant]})

    def trained(config: Config, stage: str = "train") -> Counter[str]:
        flops: Counter[str] = Counter()
        for part in work(config, SHAPES, 10, 0, {}):
            flops[part.role] += int(part.flops * (part.stage == stage))
        return flops

    tokens = 4 * 3 * 5
    more = {
        "target": TARGET.forward_flops(4 * 96, 48) + TARGET.forward_flops(tokens, 96),
        "drafter": DRAFTER.forward_flops(4 * 96, 48) + 4 * DRAFTER.forward_flops(tokens, 32),
    }
    assert {role: trained(config)[role] - trained(plain)[role] for role in more} == more
    rounds = {"rounds": 3, "steps": 4, "kl_steps": 0, "gate": {"least_documents": 5}}
    learnt = trained(config_with(improve=rounds, data={"validation_prompts": 5}), "improve")
    once = config_with(train={"variants": [MINIMAL["train"]["variants"][1]], "steps": 3 * 4})
    assert learnt == trained(once)

    before, whole = (
        train_memory.with_target(
            train_memory.train_memory(one, one.train.drafters[1], 2, DRAFTER, Sharding(), GPU),
            one, one.train.drafters[1], SHAPES, 10, GPU,
        )
        for one in (plain, config)
    )  # fmt: skip
    assert whole.weights - before.weights == TARGET.weights
    rows, sampled = 2 * 3, 2 * 3 * 5  # of the drafter: caches behind 32 entries, and their gradients
    cache = DRAFTER.kv_bytes(rows * 32 + sampled)
    cached = TARGET.kv_bytes(2 * (96 + 128 + 5))  # a prefix of 80 tokens has 128 slots
    assert whole.kv - before.kv == 3 * cache + cached
    assert whole.logits - before.logits == 3 * 4 * sampled * 300 + 3 * 4 * sampled * (300 + 300)


def test_prompts_are_read_again_where_the_fastest_are_measured_again() -> None:
    """Three times by the target, as often where it drafts, and by both drafters; every time twice."""
    sweep = {"mode": "both", "baselines": ["self_speculation", "prompt_lookup"], "measure": {"prompts": 2}}
    done = prefills(config_with(sweep=sweep), SHAPES, {Place("code", "64"): 3})
    flops = [2 * TARGET.forward_flops(2 * 64, 32), 2 * DRAFTER.forward_flops(2 * 64, 32)]
    roles = Counter(part.role for part in done)
    assert roles == {"target": 3 * (1 + 1), "drafter": 3 * 2}
    assert sum(part.flops for part in done) == 6 * sum(flops)
    assert {part.stage for part in done} == {"sweep measure"}
    named = sweep | {"measure": {"predict": False, "drafters": ["multi_view"], "prompts": 2}}
    done = prefills(config_with(sweep=named), SHAPES, {Place("code", "64"): 3})
    assert [part.flops for part in done] == [flops[0], *flops]  # the baselines are always measured


def test_what_predictions_may_point_at_is_read_too() -> None:
    """Self-speculation has no full view to be named with; of four sources the three largest read again."""
    variants = [*MINIMAL["train"]["variants"], {"name": "third", "budgets": {16: 1.0}}]
    sweep = {
        "mode": "both", "baselines": ["self_speculation"],
        "measure": {"drafters": ["multi_view"], "budgets": ["full"], "prompts": 2},
    }  # fmt: skip
    config, prompts = config_with(train={"variants": variants}, sweep=sweep), {Place("code", "64"): 3}
    roles = Counter(part.role for part in prefills(config, SHAPES, prompts))
    assert roles == {"target": 3 * (1 + 1), "drafter": 3 + 2 * 2}
    places = {Place("code", "64"): 1}
    counts = count_sweep(config_with(train={"variants": variants}, sweep=sweep), places)
    sources = 4  # each beside its own autoregressive decoding
    cells = counts.measured // 1
    assert counts.runs == 3 * (cells + sources + 2 * 4 * (3 + 3))


def test_nothing_is_measured_again_where_greedy_text_is_not_timed() -> None:
    sweep = {"mode": "both", "temperatures": [0.0, 0.7], "measure": {"temperatures": [0.7]}}
    config, prompts = config_with(sweep=sweep), {Place("code", "64"): 3}
    assert count_sweep(config, prompts).rechecked == 0
    assert len(prefills(config, SHAPES, prompts)) == 1 + 2
