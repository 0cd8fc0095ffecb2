"""A small valid config for tests that need one; copy it before changing it."""

from __future__ import annotations

import copy
from typing import Any

from pipeline.config.schema import Config

SCRATCH: dict[str, Any] = {
    "kind": "scratch",
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 64,
    "max_positions": 256,
    "pretrain": {"steps": 2, "batch_sequences": 2},
}

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "data": {
        "sources": [{"kind": "text", "name": "code", "files": ["stdlib"]}],
        "tokenizer": {"kind": "bpe", "vocab_size": 300},
        "sequence_tokens": 96,
        "max_sequences": 16,
        "contexts": [{"name": "64", "tokens": 64}],
        "max_new_tokens": 16,
        "prompts": 4,
        "validation_prompts": 2,
    },
    "target": SCRATCH,
    "drafter": {**SCRATCH, "layers": 1},
    "train": {
        "steps": 2,
        "batch_sequences": 4,
        "micro_batch_sequences": 2,
        "window_tokens": 16,
        "variants": [
            {"name": "full_only", "sparse_weight": 0},
            {"name": "multi_view", "budgets": {16: 0.6, 32: 0.4}},
        ],
    },
    "sweep": {"mode": "replay", "budgets": [16, 32, "full"], "gammas": [2, 4]},
    "run": {"executor": "inline", "device": "cpu"},
    "tracking": {"enabled": False},
}


def config_with(**groups: dict[str, Any]) -> Config:
    """The minimal config with some fields of its groups changed."""
    values = copy.deepcopy(MINIMAL)
    for group, change in groups.items():
        values[group] = {**values.get(group, {}), **change}
    return Config.model_validate(values)
