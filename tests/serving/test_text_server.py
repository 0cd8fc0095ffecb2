"""Answers to learn from, written by vLLM over HTTP: as if the target had written them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from jobs.stages.pipeline import run_pipeline
from pipeline.store.layout import LABELS, MANIFEST
from tests.helpers.toys import artifact, toy_config
from tests.helpers.vllm import NEEDS_VLLM, api_server, for_vllm

pytestmark = NEEDS_VLLM
log = logging.getLogger(__name__)


def asking(values: dict[str, Any]) -> None:
    """Beside the answers, half of the sequences end in texts that never end."""
    for_vllm(values)
    (tales,) = values["data"]["sources"]
    asked = {"ask": "Read this.\n{text}\nSay more.", "training_prompts": {48: 40, 60: 24}}
    values["data"]["sources"] = [tales, {**tales, "name": "asked", **asked}]
    values["labels"] |= {"on_policy_fraction": 0.5, "on_policy_temperature": 0.0, "sequences_per_shard": 64}
    values["drafter"]["pretrain"] |= {"steps": 3}


def test_vllm_writes_what_the_target_would(corpus: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    run_pipeline(toy_config(corpus, storage, asking), "teach")
    alone = artifact(storage, "teach")
    target = artifact(storage, "pretrain-target") / "model"
    with api_server(target, tmp_path / "log", "", at_once=16) as url:

        def served(values: dict[str, Any]) -> None:
            asking(values)
            values["labels"]["server"] = {"url": url, "requests_at_once": 16}

        run_pipeline(toy_config(corpus, storage, served), "teach")
    (folder,) = set(storage.glob("teach-*")) - {alone}
    made, theirs = (json.loads((one / MANIFEST).read_text()) for one in (folder, alone))
    counts = made["counts"]
    log.info("teach with vLLM %.1f s, alone %.1f s: %s", made["seconds"], theirs["seconds"], counts)
    assert counts["served"] > 64 and counts["answers"] == theirs["counts"]["answers"]
    shares = np.concatenate([np.load(file) for file in (folder / LABELS).glob("*.agreement.npy")])
    assert len(shares) == counts["served"] and shares.mean() > 0.99
    parted = 0
    for file in (alone / LABELS).glob("*.tokens.npy"):
        ours, others = np.load(file), np.load(folder / LABELS / file.name)
        parted += int((ours != others).any(axis=1).sum())
    assert parted <= counts["refused"] + int((shares < 1).sum())
