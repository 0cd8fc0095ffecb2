"""A training job's inputs for each file of the tests, and the run that nothing stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.helpers.tiny import Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, target: PreTrainedModel, make_model: Any) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("training"), target, make_model(layers=1, seed=7))


@pytest.fixture(scope="module")
def uninterrupted(workshop: Workshop) -> Path:
    return workshop.train("uninterrupted")
