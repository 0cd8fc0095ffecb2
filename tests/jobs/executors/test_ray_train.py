"""DeepSpeed's settings file: values of a type that would fail in a reader, or in every worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.commands.doctor import _deepspeed
from jobs.executors.ray_train import read_settings
from jobs.plan.report import plan
from pipeline.errors import BadData
from pipeline.train.sharding import Sharding, sharding_of
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_config

WRONG: dict[str, tuple[Any, str]] = {
    "number": (3, "zero_optimization is 3"),
    "true": (True, "zero_optimization is true"),
    "null": (None, "zero_optimization is null"),
    "list": ([1], "zero_optimization is [1]"),
    "long": ("z" * 5000, 'zero_optimization is "zzz'),
    "stage as text": ({"stage": "1"}, 'zero_optimization.stage is "1"'),
    "no stage": ({"stage": 4}, "zero_optimization.stage is 4"),
    "true as stage": ({"stage": True}, "zero_optimization.stage is true"),
    "half a stage": ({"stage": 1.5}, "zero_optimization.stage is 1.5"),
    "offload": ({"offload_optimizer": "cpu"}, 'zero_optimization.offload_optimizer is "cpu"'),
    "device": ({"offload_optimizer": {"device": ["cpu"]}}, "offload_optimizer.device is"),
    "bucket": ({"reduce_bucket_size": "auto"}, 'zero_optimization.reduce_bucket_size is "auto"'),
    "endless": ({"stage3_max_live_parameters": float("inf")}, "stage3_max_live_parameters is Infinity"),
    "nan": ({"stage3_max_live_parameters": float("nan")}, "stage3_max_live_parameters is NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_zero_settings_of_another_type_are_named(tmp_path: Path, case: str) -> None:
    value, part = WRONG[case]
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": value}))
    with pytest.raises(BadData) as caught:
        read_settings(str(file))
    text = str(caught.value)
    assert text.startswith(f"train.deepspeed: {file}: ") and part in text and "it must be" in text, text
    assert len(text) < 400 + len(str(file))


REFUSED = [
    (
        {"zero_optimization": {"stage": 1, "reduce_buckt_size": 5}},
        "zero_optimization.reduce_buckt_size is no setting of DeepSpeed's; did you mean reduce_bucket_size",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}},
        "zero_optimization.offload_param.device is \"tape\": Input should be 'none', 'cpu' or 'nvme'",
    ),
    ({"zero_optimization": {"overlap_comm": "maybe"}}, 'zero_optimization.overlap_comm is "maybe"'),
    (
        {"zero_optimisation": {"stage": 3}},
        "there is no 'zero_optimisation'; did you mean zero_optimization",
    ),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED)
def test_what_deepspeed_would_refuse_or_pass_over_is_named(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """By DeepSpeed's own classes, before workers begin."""
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(BadData) as caught:
        read_settings(str(file))
    assert str(caught.value).startswith(f"train.deepspeed: {file}: {words}")


def test_every_reader_says_so(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": 3}')
    (tmp_path / "text.txt").write_text("the same words again and again " * 100)
    sources = [{"kind": "text", "name": "text", "files": [str(tmp_path / "text.txt")]}]
    changes = {"run.executor": "ray", "train.deepspeed": str(file), "data.sources": sources}
    config = tiny_config({**changes, "storage": str(tmp_path / "runs")})
    check = _deepspeed(config)
    assert check.status == "fail" and f"{file}: zero_optimization is 3" in check.text
    with pytest.raises(BadData, match="zero_optimization is 3"):
        plan(config, as_json=True, memory_gb=1, tflops=1.0, step_ms=1.0)


def test_settings_that_deepspeed_takes_are_taken(tmp_path: Path) -> None:
    for file in (ROOT / "conf/deepspeed").glob("*.json"):
        assert read_settings(str(file)) == json.loads(file.read_text())
    file = tmp_path / "zero.json"
    zero = {
        "stage": 3,
        "offload_optimizer": {"device": "nvme"},
        "reduce_bucket_size": 5e7,
        "overlap_comm": True,
    }
    file.write_text(json.dumps({"zero_optimization": zero, "steps_per_print": 10}))
    assert sharding_of(read_settings(str(file)), 2) == Sharding(3, 2, 50_000_000, offload=True)
    file.write_text("{}")
    assert sharding_of(read_settings(str(file)), 2) == Sharding(0, 2)
