"""Next-token pretraining against transformers' own loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.train.batches import Shards, batch_indices
from pipeline.train.objectives import NextToken
from tests.helpers.tiny import VOCABULARY, numbers, tiny_config, tiny_prompts
from tests.helpers.training import CPU, SEQUENCE, config_for


def test_next_token_loss_is_transformers_own(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    np.save(tmp_path / "train-00000.npy", numbers(6, 96, seed=5))
    config = tiny_config()
    assert config.target.kind == "scratch"
    tokens = Shards([tmp_path / "train-00000.npy"])
    prompts = tiny_prompts("validation", 3, 40, 8)
    model = make_model(seed=2)
    objective = NextToken(config, config.target.pretrain, tokens, prompts, CPU)
    loss, terms = objective.loss(model, step=1, micro=0)
    rows = tokens.rows(batch_indices(6, 2, config.seed, 1))
    torch.testing.assert_close(loss, model(input_ids=rows, labels=rows, use_cache=False).loss)
    assert torch.equal(terms["next_token"], loss)
    with torch.no_grad():
        own = [
            float(model(input_ids=ids, labels=ids, use_cache=False).loss)
            for ids in (torch.tensor([prompt.tokens]) for prompt in prompts)
        ]
    assert objective.validate(model) == {"validation/next_token": pytest.approx(sum(own) / 3)}


def test_pretraining_on_pieces_reads_a_part_of_each_sequence(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Sequences that count upwards: whatever the piece, its tokens follow one another."""
    model = make_model(layers=3, seed=4).double()
    config = config_for({"sparse_weight": 0})
    rows = np.arange(SEQUENCE)[None] % VOCABULARY + np.zeros((6, 1), dtype=int)
    np.save(tmp_path / "s.npy", rows.astype(np.uint16))
    group = config.target.pretrain.model_copy(update={"sequence_tokens": 33})  # type: ignore[union-attr]
    objective = NextToken(config, group, Shards([tmp_path / "s.npy"]), [], CPU)
    pieces = [rows[0, at : at + 33] for at in range(SEQUENCE - 33 + 1)]
    with torch.no_grad():
        losses = [
            float(model(input_ids=ids, labels=ids, use_cache=False).loss)
            for ids in (torch.from_numpy(piece)[None] for piece in pieces)
        ]
        found = [float(objective.loss(model, step, 0)[0]) for step in range(8)]
    nearest = [min(range(len(losses)), key=lambda at: abs(losses[at] - loss)) for loss in found]
    assert all(found[i] == pytest.approx(losses[at], rel=1e-5) for i, at in enumerate(nearest))
    assert len(set(nearest)) > 3, "pieces come from different places"
