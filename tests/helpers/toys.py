"""A toy pipeline that runs in seconds, in one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.store.artifacts import checksum
from pipeline.store.files import file_sha256
from pipeline.store.layout import MANIFEST
from tests.helpers.configs import MINIMAL

PROMPTS = 12


def toy_config(
    corpus: Path, storage: Path, change: Callable[[dict[str, Any]], object] | None = None
) -> Config:
    """Two label shards, two replay tasks, both modes; `change` edits the values."""
    values = copy.deepcopy(MINIMAL)
    values |= {"storage": str(storage)}
    source = {"kind": "text", "name": "tales", "files": ["*.txt"], "validation_fraction": 0.1}
    values["data"] |= {
        "root": str(corpus), "sources": [{**source, "test_fraction": 0.3}], "prompts": PROMPTS,
        "prompts_per_document": 2, "max_sequences": 40,
    }  # fmt: skip
    values["labels"] = {"sequences_per_shard": 20}
    values["train"] |= {"steps": 8, "learning_rate": 3e-3, "validation_budgets": [16, "full"]}
    # Long enough that the target does not say one token again and again.
    for role, steps in (("target", 100), ("drafter", 30)):
        rates = {"learning_rate": 0.02, "warmup_steps": 5}
        values[role]["pretrain"] = {"steps": steps, "batch_sequences": 4, **rates}
    measure = {"drafters": ["multi_view"], "budgets": [16], "gammas": [2], "prompts": 2, "repeats": 1}
    measure["predict"] = False
    values["sweep"] |= {"mode": "both", "measure": measure}
    values["report"] = {"bootstrap_samples": 100}
    if change:
        change(values)
    return Config.model_validate(values)


def artifact(storage: Path, stage: str) -> Path:
    (folder,) = (f for f in storage.glob(f"{stage}-*") if f.name.rpartition("-")[0] == stage)
    return folder


def reseal(folder: Path) -> None:
    """Make the manifest say that the files are as they were made."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, known in manifest["files"].items():
        known["sha256"], known["bytes"] = file_sha256(folder / name), (folder / name).stat().st_size
    (folder / MANIFEST).write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))
