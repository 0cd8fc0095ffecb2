"""Drafters of other architectures in the training job: what their configs say beside shapes has no effect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from jobs.executors.inline import InlineExecutor
from pipeline.errors import BadData
from pipeline.models.load import ModelRef
from pipeline.models.weights import WEIGHTS
from pipeline.train.job import run_job
from tests.helpers.tiny import Workshop, weights
from tests.helpers.zoo import saved, tiny

STEPS = {"train.steps": 3, "train.validate_every": 3}
DROPOUT = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
NONE = dict.fromkeys(DROPOUT, 0.0)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("job"), target, target)


def train(workshop: Workshop, name: str, drafter: ModelRef, changes: dict[str, Any] = STEPS) -> Path:
    job = replace(workshop.job(name, changes), drafter=drafter)
    InlineExecutor(job.config).train(run_job, job)
    return job.outputs["multi_view"]


def test_dropout_of_a_config_does_not_train(workshop: Workshop, tmp_path: Path) -> None:
    """Two runs give the same weights, which are those without dropout; the config says what it said."""
    shape = {"max_position_embeddings": 96}
    noisy = saved(tiny("gpt2", **shape, **DROPOUT), tmp_path / "noisy")
    plain = saved(tiny("gpt2", **shape, **NONE), tmp_path / "plain")
    folders = [train(workshop, f"gpt2-{number}", ref) for number, ref in enumerate((noisy, noisy, plain))]
    first, *others = (weights(folder) for folder in folders)
    for state in others:
        assert state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in first)
    start = load_file(Path(plain.path) / WEIGHTS)
    assert any(not torch.equal(start[name], first[name]) for name in first)
    assert AutoConfig.from_pretrained(folders[0] / "model").resid_pdrop == 0.3


@pytest.mark.parametrize("name", ["granite", "mixtral", "opt"])
def test_other_architectures_are_trained(workshop: Workshop, tmp_path: Path, name: str) -> None:
    """Every weight but those that no loss reaches, with losses from states where these stand for logits."""
    ref = saved(tiny(name, max_position_embeddings=96), tmp_path / "start")
    before = load_file(Path(ref.path) / WEIGHTS)
    one, other = (
        weights(train(workshop, f"{name}-{limit}", ref, {**STEPS, "train.max_logits_mib": limit}))
        for limit in (256, 0)
    )
    assert one.keys() == before.keys()
    assert all(not torch.equal(one[key], before[key]) for key in one if "norm" not in key)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=2e-3, rtol=1e-3)


def test_a_drafter_that_cannot_be_trained_is_bad_data(workshop: Workshop, tmp_path: Path) -> None:
    ref = saved(tiny("gpt2"), tmp_path / "start", role="drafter", reach=96)
    with pytest.raises(BadData, match=r"drafter .* has 64 learned positions and no more, and texts get 96"):
        train(workshop, "short", ref)
