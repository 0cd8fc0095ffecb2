"""What the tests of a file share: a training job's inputs, the run that nothing stopped, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.train.batches import LabelledSequences
from tests.helpers.tiny import VOCABULARY, Workshop, numbers
from tests.helpers.training import LABELS_K, SEQUENCE


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, make_model: Any) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("training"), target, make_model(layers=1, seed=7))


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop) -> Path:
    return workshop.train("uninterrupted")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledSequences:
    """Random sequences, and labels that have nothing to do with them."""
    folder: Path = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(2)
    log_p = torch.from_numpy(rng.normal(size=(9, SEQUENCE, VOCABULARY)) * 2).log_softmax(-1)
    top = log_p.topk(LABELS_K, dim=-1)
    arrays = {
        "tokens": numbers(9, SEQUENCE, seed=1),
        "argmax": log_p.argmax(-1).numpy().astype(np.uint16),
        "ids": top.indices.numpy().astype(np.uint16),
        "log_probs": top.values.numpy().astype(np.float16),
    }
    for name, array in arrays.items():
        np.save(folder / f"shard-00000.{name}.npy", array)
    return LabelledSequences(folder, temperature=1.0)
