"""What a worker holds by ZeRO stage, by hand."""

from __future__ import annotations

import json

import pytest

from pipeline.hardware import Device
from pipeline.train.sharding import Sharding, sharding_of
from tests.helpers.paths import ROOT

GPU, CPU = Device("cuda", 0), Device("cpu", 0)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [
        (None, 4000, 4000, 8000),
        (0, 4000, 4000, 8000),
        (1, 4000, 4000 + 1000 + 400, 3000),  # a quarter of moments and master weights
        (2, 4000, 1000 + 400, 3000),
        (3, 1000 + 800, 1000 + 400, 3000),  # 200 parameters are gathered at a time
    ],
)
def test_optimizer_state_by_hand(stage: int | None, weights: int, gradients: int, optimizer: int) -> None:
    """1000 parameters, 4 workers, a bucket of 100 elements."""
    sharding = Sharding(stage, 1 if stage is None else 4, bucket=100, live=200)
    assert sharding.state_bytes(1000, GPU) == (weights, gradients, optimizer)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, 4000),  # a copy of all gradients
        (1, 0),
        (2, 400),  # a second bucket
        (3, 0.8 * (1800 + 1400)),  # 1.8 times what is gathered and reduced
    ],
)
def test_a_cpu_holds_more_by_hand(stage: int, more: float) -> None:
    """1000 parameters, 4 workers, a bucket of 100 elements, 200 gathered at once."""
    sharding = Sharding(stage, 4, bucket=100, live=200)
    assert sum(sharding.state_bytes(1000, CPU)) - sum(sharding.state_bytes(1000, GPU)) == more


def test_settings_of_deepspeed_are_read() -> None:
    settings = json.loads((ROOT / "conf/deepspeed/zero3.json").read_text())
    assert sharding_of(settings, 2) == Sharding(3, 2)
    settings["zero_optimization"] |= {"reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu"}}
    offloaded = sharding_of(settings, 2)
    assert offloaded == Sharding(3, 2, bucket=50_000_000, offload=True)
    assert offloaded.state_bytes(1000, GPU)[2] == 0


@pytest.mark.parametrize(("stage", "workers"), [(None, 1), (1, 4), (2, 4), (3, 4)])
def test_frozen_parameters_have_weights_alone(stage: int | None, workers: int) -> None:
    sharding = Sharding(stage, workers, bucket=100, live=200)
    plain, partly = sharding.state_bytes(300, GPU), sharding.state_bytes(300, GPU, frozen=700)
    assert partly[1:] == plain[1:]
    assert partly[0] - plain[0] == 4 * 700 // (4 if stage == 3 else 1)
