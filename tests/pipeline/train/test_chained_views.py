"""A head's objective against chains that are computed one window, view and depth at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.axes import FULL
from pipeline.decode.model import decode_model
from pipeline.kv.views import view_of
from pipeline.models.heads.begin import head_of
from pipeline.models.heads.eagle import FeatureHead
from pipeline.store.rows import Continuation
from pipeline.train.batches import LabelledSequences, draw
from pipeline.train.chained_views import ChainedViews
from pipeline.train.losses import LOSSES, TargetLabels
from pipeline.train.target.features import GivenFeatures
from tests.helpers.feature_heads import head_pair, prompt, six_layers, trained_head
from tests.helpers.pairs import plain_tokens, rounds_of
from tests.helpers.tiny import VOCABULARY, tiny_config, tiny_prompts
from tests.helpers.training import CPU

LENGTH, WINDOW, WINDOWS, DEPTH, DECAY = 80, 10, 2, 3, 0.7
PROPOSABLE = 50
CONFIG: dict[str, Any] = {
    "target.layers": 6, "drafter": {"kind": "head"}, "data.sequence_tokens": LENGTH, "labels.top_k": 5,
    "train.window_tokens": WINDOW, "train.windows": WINDOWS, "train.min_prefix_tokens": 20,
    "train.batch_sequences": 2, "train.micro_batch_sequences": 2, "train.chain_steps": DEPTH,
    "train.chain_decay": DECAY, "train.draft_vocabulary": PROPOSABLE, 
    "train.validation_budgets": [16, "full"], "train.validation_gamma": 3,
}  # fmt: skip


class Noise:
    """Features that have nothing to do with the tokens."""

    def __init__(self, rows: int) -> None:
        self.values = torch.randn(rows, LENGTH, 3 * 48, generator=torch.Generator().manual_seed(3))

    def of_rows(self, rows: Sequence[int], tokens_BL: Tensor) -> Tensor:
        return self.values[list(rows)]

    def of_text(self, number: int, tokens_1S: Tensor) -> Tensor:
        raise AssertionError("nothing is validated here")


def write_shard(folder: Path, name: str, rows: int, labelled: int, seed: int, **others: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    log_p = torch.from_numpy(rng.normal(size=(rows, labelled, VOCABULARY)) * 2).log_softmax(-1)
    top = log_p.topk(5, dim=-1)
    arrays = {
        **others,
        "tokens": rng.integers(3, VOCABULARY, (rows, LENGTH)).astype(np.uint16),
        "argmax": log_p.argmax(-1).numpy().astype(np.uint16),
        "ids": top.indices.numpy().astype(np.uint16),
        "log_probs": top.values.numpy().astype(np.float16),
    }
    for kind, array in arrays.items():
        np.save(folder / f"{name}-00000.{kind}.npy", array)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledSequences:
    """Three texts and three answers, of which one has a single label and one ends in its second window."""
    folder: Path = tmp_path_factory.mktemp("labels")
    write_shard(folder, "shard", 3, LENGTH, 1)
    prefix, supervised = np.array([40, 33, 60], np.int32), np.array([1, 14, 20], np.int32)
    write_shard(folder, "answers", 3, WINDOW * WINDOWS, 2, prefix=prefix, supervised=supervised)
    return LabelledSequences(folder, 1.0)


@pytest.fixture
def head() -> FeatureHead:
    return head_of(six_layers(3), torch.arange(7, 7 + PROPOSABLE))


def expected_loss(
    objective: ChainedViews, head: FeatureHead, data: LabelledSequences, step: int, noise: Noise
) -> tuple[Tensor, Tensor]:
    """Full and sparse: every window, view and depth alone."""
    config, variant = objective.config, objective.variant
    drawn = draw(variant, config.train, LENGTH, objective.seed, step, 0)
    views = [FULL, *(view_of(variant.policy, budget) for budget in drawn.budgets)]
    totals = []
    for view in views:
        value, weight = torch.zeros(()), 0.0
        for depth in range(DEPTH):
            losses = []
            for row in objective.rows(step, 0):
                prefix, learned = int(data.prefix[row]), int(data.supervised[row])
                starts = drawn.starts if prefix < 0 else range(prefix, prefix + learned, WINDOW)
                for start in starts:
                    tokens, features = data.tokens.rows([row]), noise.values[[row]]
                    out = head(tokens, features, [start], WINDOW, [view], depth + 1)[depth][0]
                    for t in range(WINDOW - depth):
                        at = start + t + depth - max(prefix, 0)
                        if prefix >= 0 and at >= learned:
                            continue
                        assert data.ids and data.log_probs
                        labels = TargetLabels(
                            data.argmax.rows([row])[:, at],
                            data.ids.rows([row])[:, at],
                            data.log_probs.rows([row])[:, at],
                        ).within(head.lm_head.tokens, VOCABULARY)
                        name = variant.full_loss if view is FULL else variant.sparse_loss
                        losses.append(LOSSES[name](head.lm_head(out[[t]]), labels)[0])
            if losses:
                value, weight = value + DECAY**depth * torch.stack(losses).mean(), weight + DECAY**depth
        totals.append(value / weight)
    shares = [count / variant.num_views for count in drawn.budgets.values()]
    return totals[0], sum((s * t for s, t in zip(shares, totals[1:], strict=True)), torch.zeros(()))


@pytest.mark.parametrize("limit", [256, 0])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "nla", "lk_hybrid"])
def test_the_loss_and_its_gradients_are_those_of_chains_alone(
    data: LabelledSequences, head: FeatureHead, loss: str, limit: int
) -> None:
    """With whole logits, and without: in tiles of the draft vocabulary."""
    variant = {"name": "v", "budgets": {16: 0.5, 24: 0.5}, "full_loss": loss, "sparse_loss": loss}
    config = tiny_config(CONFIG | {"train.variants": [variant], "train.max_logits_mib": limit})
    noise = Noise(len(data))
    objective = ChainedViews(config, config.train.variants[0], data, [], CPU, noise)
    kinds = set()
    for step in range(3):
        kinds |= {int(data.prefix[row]) for row in objective.rows(step, 0)}
        total, told = objective.loss(head, step, 0)
        full, sparse = expected_loss(objective, head, data, step, noise)
        assert float(told["full"].detach()) == pytest.approx(float(full.detach()), rel=1e-4)
        assert float(told["sparse"].detach()) == pytest.approx(float(sparse.detach()), rel=1e-4)
        ours = torch.autograd.grad(total, list(head.parameters()))
        theirs = torch.autograd.grad(full + 0.5 * sparse, list(head.parameters()))
        for (name, _), mine, other in zip(head.named_parameters(), ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3, msg=name)
    assert len(kinds) > 2


@torch.no_grad()
def test_validation_is_decoding(tmp_path: Path, data: LabelledSequences) -> None:
    """Acceptance on the validation prompts, by budget, as speculation counts it."""
    target = six_layers(1)
    given = [prompt(length, length) for length in (45, 41)]
    with torch.enable_grad():
        head = trained_head(target, given)
    variant = {"name": "v", "budgets": {16: 1.0}}
    config = tiny_config(CONFIG | {"train.variants": [variant]})
    limit, pairs = 24, []
    counted = {budget: [0, 0] for budget in (16, "full")}
    for number, tokens in enumerate(given):
        for budget, counts in counted.items():
            both = head_pair(target, head, [tokens], view_of("chunk_topk", budget), limit + 4)  # type: ignore[arg-type]
            (plain,) = plain_tokens(both.pair, limit)
            (rounds,) = rounds_of(both.pair, 3, limit, source=both.source())
            counts[0] += sum(one.accepted for one in rounds)
            counts[1] += sum(one.proposed or 0 for one in rounds)
        (row,) = tiny_prompts("validation", 1, tokens.shape[1], limit)
        row = row.model_copy(update={"tokens": tokens[0].tolist(), "prompt_id": str(number)})
        text = Continuation(
            prompt_id=str(number), document_id="d", dataset="code", context="c", split="validation",
            prompt_tokens=tokens.shape[1], tokens=plain, gaps=[], eos_at=None, text="", repetition_rate=0.0,
        )  # fmt: skip
        pairs.append((row, text))
    features = GivenFeatures(decode_model(target), head.config.feature_layers)
    objective = ChainedViews(config, config.train.variants[0], data, pairs, CPU, features)
    scores = objective.validate(head)
    for name, budget in (("b16", 16), ("full", "full")):
        accepted, proposed = counted[budget]
        assert scores[f"validation/acceptance_{name}"] == pytest.approx(accepted / proposed) and accepted
