"""Learning from served rounds: which labels count, and the two losses against written-out ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.axes import FULL
from pipeline.store.files import write_rows
from pipeline.store.rows import LoggedRound, ServedText
from pipeline.train.batches import LabelledSequences
from pipeline.train.served import ServedViews, decided
from tests.helpers.tiny import VOCABULARY, tiny_config
from tests.helpers.training import CPU

LENGTH, WINDOW, WINDOWS, TOP = 96, 8, 2, 5
MOST = WINDOW * WINDOWS
KL_STEPS = 2
# By text: its prompt, and rounds as (begins at, proposals, accepted).
ROUNDS = [
    (40, [(1, 4, 2), (4, 4, 4), (9, 4, 0), (10, 3, 3)]),  # the last ends the text with EOS: no own token
    (57, [(1, 4, 0), (2, 4, 4)]),
    (33, [(1, 1, 1)]),
]
# Label a is about token a + 1.
DECIDED = [[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11], [0, 1, 2, 3, 4], [0]]
LENGTHS = [13, 7, 2]


def text(prompt: int, rounds: list[tuple[int, int, int]], length: int) -> ServedText:
    logged = [LoggedRound(begins_at=at, proposals=[9] * n, accepted=k) for at, n, k in rounds]
    named = {"prompt_id": "p", "document_id": "d", "prompt_tokens": prompt}
    return ServedText(**named, view=FULL, gamma=4, tokens=[5] * length, rounds=logged)


TEXTS = [text(prompt, rounds, n) for (prompt, rounds), n in zip(ROUNDS, LENGTHS, strict=True)]


def test_what_is_decided_ends_with_the_first_rejected_proposal() -> None:
    assert [np.flatnonzero(row).tolist() for row in decided(TEXTS, MOST)] == DECIDED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard with random labels."""
    made: Path = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(4)
    N = len(TEXTS)
    ids = np.argsort(rng.random((N, MOST, VOCABULARY)))[..., :TOP].astype(np.uint16)
    arrays = {
        "tokens": rng.integers(3, VOCABULARY, (N, LENGTH)).astype(np.uint16),
        "prefix": np.array([row.prompt_tokens for row in TEXTS], np.int32),
        "supervised": np.array(LENGTHS, np.int32) - 1,
        "ids": ids,
        "log_probs": np.sort(-rng.random((N, MOST, TOP)) - 2).astype(np.float16),
        "argmax": ids[..., 0],
    }
    for name, array in arrays.items():
        np.save(made / f"answers-00000.{name}.npy", array)
    write_rows(made / "answers-00000.rounds.jsonl", TEXTS)
    return made


@torch.no_grad()
@pytest.mark.parametrize("budgets", [{}, {80: 1.0}])
def test_kl_everywhere_first_then_cross_entropy_where_a_proposal_was_decided(
    folder: Path, make_model: Any, budgets: dict[int, float]
) -> None:
    """Against one plain forward pass a text: the budget keeps every prefix whole. The variant's own losses,
    total variation, are not asked."""
    variant = {"name": "v", "budgets": budgets, "sparse_weight": 0.5 if budgets else 0, "num_views": 1}
    variant |= {"full_loss": "total_variation", "sparse_loss": "total_variation"}
    changes = {
        "data.sequence_tokens": LENGTH, "labels.top_k": TOP, "train.window_tokens": WINDOW,
        "train.windows": WINDOWS, "train.batch_sequences": 2, "train.micro_batch_sequences": 2,
        "train.variants": [variant],
    }  # fmt: skip
    config = tiny_config(changes)
    model = make_model(layers=2, seed=8).double().eval()
    data = LabelledSequences(folder, 1.0)
    objective = ServedViews(config, config.train.variants[0], data, [], CPU, folder, KL_STEPS)
    assert data.chosen is None
    seen = set()
    for step in range(6):
        total, told = objective.loss(model, step, 0)
        values = []
        for row in objective.at(step).rows(step, 0):
            seen.add((row, step < KL_STEPS))
            tokens = torch.from_numpy(np.load(folder / "answers-00000.tokens.npy")[row : row + 1].astype(int))
            log_q = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            labels = range(LENGTHS[row] - 1) if step < KL_STEPS else DECIDED[row]
            for a in labels:
                at = log_q[ROUNDS[row][0] + a]
                if step >= KL_STEPS:
                    values.append(-at[int(np.load(folder / "answers-00000.argmax.npy")[row, a])])
                    continue
                ids = torch.from_numpy(np.load(folder / "answers-00000.ids.npy")[row, a].astype(int))
                log_p = torch.from_numpy(np.load(folder / "answers-00000.log_probs.npy")[row, a]).double()
                rest_p, rest_q = 1 - log_p.exp().sum(), 1 - at[ids].exp().sum()
                inside = (log_p.exp() * (log_p - at[ids])).sum()
                values.append(inside + rest_p * (rest_p.log() - rest_q.log()))
        expected = float(torch.stack(values).mean())
        assert float(told["full"]) == pytest.approx(expected, rel=1e-5)
        assert float(total) == pytest.approx(expected * (1.5 if budgets else 1.0), rel=1e-5)
    assert {kl for _, kl in seen} == {True, False} and {row for row, _ in seen} == {0, 1, 2}
    assert objective.name_batch(0, 0).startswith("answers-00000.tokens.npy row")
