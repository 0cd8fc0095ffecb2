"""The two-branch loss against separate dense forwards, one per window and view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.config.schema import Config
from pipeline.kv.view_cache import WHOLE
from pipeline.kv.views import view_of
from pipeline.train.batches import Draw, LabelledSequences, Shards, batch_indices, draw
from pipeline.train.losses import States
from pipeline.train.objectives import MultiView
from pipeline.train.windows import window_scores
from tests.helpers.dense import assert_same_gradients, dense_logits, gradients
from tests.helpers.tiny import VOCABULARY, numbers
from tests.helpers.training import CPU, SEQUENCE, WINDOW, config_for
from tests.helpers.zoo import our_model, tiny

NO_LIMIT = 2**40


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Double precision, so that agreement is agreement."""
    return make_model(layers=3, seed=4).double().train()


def oracle_logits(
    model: PreTrainedModel, tokens: Tensor, start: int, view: View, detach: bool = True
) -> Tensor:
    """Logits [B, WINDOW, V] of one window behind one view."""
    return dense_logits(model, tokens[:, : start + WINDOW], start, view, detach)


def textbook(name: str, logits: Tensor, data: LabelledSequences, rows: list[int], start: int) -> Tensor:
    """Mean loss of one window, written out once more: the tail is one bucket."""
    flat = logits.flatten(0, 1).float()

    def labels(shards: Shards) -> Tensor:
        return shards.rows(rows)[:, start : start + WINDOW].flatten(0, 1)

    if name == "cross_entropy":
        return F.cross_entropy(flat, labels(data.argmax))
    assert data.ids is not None and data.log_probs is not None
    q = flat.softmax(-1).gather(-1, labels(data.ids))
    p = labels(data.log_probs).exp()
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    if name == "kl":
        return F.kl_div(q.log(), p.log(), log_target=True, reduction="none").sum(-1).mean()
    return (p - q).abs().sum(-1).mean() / 2


def oracle_loss(
    model: PreTrainedModel, config: Config, data: LabelledSequences, drawn: Draw, rows: list[int]
) -> Tensor:
    """w·L_A + λ·L_C, one forward per window and drawn budget, the same budget drawn twice read twice."""
    variant = config.train.variants[0]
    tokens = data.tokens.rows(rows)

    def branch(loss: str, views: list[View]) -> Tensor:
        terms = [
            textbook(loss, oracle_logits(model, tokens, start, view), data, rows, start)
            for view in views
            for start in drawn.starts
        ]
        return torch.stack(terms).mean() if terms else torch.zeros(())

    sparse = [
        view_of(variant.policy, b, variant.sinks) for b, times in drawn.budgets.items() for _ in range(times)
    ]
    full = variant.full_weight * branch(variant.full_loss, [FULL])
    return full + variant.sparse_weight * branch(variant.sparse_loss, sparse)


@pytest.mark.parametrize("policy", ["chunk_topk", "chunk_topk_paper", "streaming", "snapkv", "window"])
def test_window_logits_are_those_of_separate_dense_forwards(model: PreTrainedModel, policy: str) -> None:
    tokens = torch.from_numpy(numbers(2, SEQUENCE, seed=3).astype(np.int64))
    starts, views = (61, 37, 25), [FULL, view_of(policy, 32), view_of(policy, 24), view_of(policy, 0)]
    with torch.no_grad():
        ours = window_scores(model, tokens, starts, WINDOW, views, NO_LIMIT)
        for view, logits in zip(views, ours, strict=True):
            separate = [oracle_logits(model, tokens, start, view).flatten(0, 1) for start in starts]
            torch.testing.assert_close(logits, torch.cat(separate), atol=1e-8, rtol=1e-8)


def test_a_budget_of_the_whole_prefix_is_the_full_view(model: PreTrainedModel) -> None:
    tokens = torch.from_numpy(numbers(2, SEQUENCE, seed=3).astype(np.int64))
    with torch.no_grad():
        full, wide = window_scores(model, tokens, (60, 36), WINDOW, [FULL, view_of("snapkv", 64)], NO_LIMIT)
    torch.testing.assert_close(full, wide, atol=1e-10, rtol=1e-10)


VARIANTS: list[dict[str, Any]] = [
    {"sparse_weight": 0},
    {"sparse_weight": 0.5, "budgets": {16: 0.5, 32: 0.3, 64: 0.2}, "num_views": 3},
    {"sparse_weight": 1.0, "budgets": {24: 1.0}, "num_views": 1, "policy": "snapkv"},
    {"sparse_weight": 0.5, "budgets": {0: 0.5, 16: 0.5}, "num_views": 5, "policy": "streaming"},
    {"full_weight": 0, "sparse_weight": 2.0, "budgets": {16: 1.0}, "policy": "chunk_topk_paper"},
    {"full_loss": "kl", "sparse_loss": "total_variation", "budgets": {16: 0.5, 32: 0.5}},
    {"budgets": {16: 0.5, 24: 0.5}, "num_views": 3, "policy": "window", "sinks": 4},
    {"full_weight": 0.3, "full_loss": "total_variation", "sparse_loss": "kl", "budgets": {16: 1.0}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
def test_loss_and_gradients_are_the_oracles(
    model: PreTrainedModel, data: LabelledSequences, variant: dict[str, Any]
) -> None:
    config = config_for(variant)
    step, micro = 3, 1
    drawn = draw(config.train.variants[0], config.train, SEQUENCE, config.seed, step, micro)
    rows = batch_indices(len(data), 4, config.seed, step)[2:]
    objective = MultiView(config, config.train.variants[0], data, [], CPU)

    ours, terms = objective.loss(model, step, micro)
    our_gradients = gradients(model, ours)
    theirs = oracle_loss(model, config, data, drawn, rows)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert_same_gradients(our_gradients, gradients(model, theirs))

    spec = config.train.variants[0]
    parts = spec.full_weight * terms["full"] + spec.sparse_weight * terms["sparse"]
    torch.testing.assert_close(terms["total"], parts)
    assert torch.equal(terms["total"], ours)


def test_budgets_drawn_twice_count_twice(model: PreTrainedModel, data: LabelledSequences) -> None:
    """Five draws of two budgets repeat one at least: the mean goes over draws, not over budgets."""
    config = config_for({"full_weight": 0, "sparse_weight": 1, "budgets": {16: 0.5, 48: 0.5}, "num_views": 5})
    variant = config.train.variants[0]
    step = next(
        step
        for step in range(100)
        if sorted(draw(variant, config.train, SEQUENCE, config.seed, step, 0).budgets.values()) == [1, 4]
    )
    drawn = draw(variant, config.train, SEQUENCE, config.seed, step, 0)
    rows = batch_indices(len(data), 4, config.seed, step)[:2]
    ours, _ = MultiView(config, variant, data, [], CPU).loss(model, step, 0)
    unweighted = Draw(drawn.starts, dict.fromkeys(drawn.budgets, 1))
    torch.testing.assert_close(ours, oracle_loss(model, config, data, drawn, rows), atol=1e-6, rtol=1e-5)
    assert abs(float((ours - oracle_loss(model, config, data, unweighted, rows)).detach())) > 1e-4


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "total_variation"])
def test_losses_without_logits_are_those_of_logits(
    make_model: Callable[..., PreTrainedModel],
    data: LabelledSequences,
    loss: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Value and gradients; and the head never runs, so that no logits can have been made."""
    variant = {"budgets": {16: 1.0, 32: 1.0}, "full_loss": loss, "sparse_loss": loss}
    model = make_model(layers=2, seed=4).train()
    found = []
    for limit in (256, 0):
        config = config_for(variant, max_logits_mib=limit)
        objective = MultiView(config, config.train.variants[0], data, [], CPU)
        if limit == 0:
            head = model.get_output_embeddings()
            monkeypatch.setattr(head, "forward", lambda x: x.new_zeros(*x.shape[:-1], VOCABULARY))
        value, _ = objective.loss(model, 0, 0)
        found.append((float(value.detach()), gradients(model, value)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes", "plain"),
    [
        ("gemma3_text", {"sliding_window": SEQUENCE, "final_logit_softcapping": 5.0}, False),
        ("granite", {}, False),
        ("cohere", {}, False),
        ("phi", {}, False),
        ("granite", {"logits_scaling": 1.0}, True),
        ("mixtral", {}, True),
    ],
    ids=["capped", "divided", "multiplied", "biased", "granite", "mixtral"],
)
def test_losses_are_of_the_logits_that_a_model_gives(name: str, changes: dict[str, Any], plain: bool) -> None:
    """However few logits a micro-batch may make: states and head stand for them only where they are both."""
    model = our_model(tiny(name, max_position_embeddings=SEQUENCE, **changes))
    for module in model.modules():
        setattr(module, WHOLE, True)
    tokens = torch.from_numpy(numbers(2, SEQUENCE, seed=3).astype(np.int64))
    views = [FULL, view_of("streaming", 16)]
    made = window_scores(model, tokens, (40, 60), WINDOW, views, NO_LIMIT)
    few = window_scores(model, tokens, (40, 60), WINDOW, views, 0)
    for logits, scores in zip(made, few, strict=True):
        assert isinstance(logits, Tensor) and isinstance(scores, States if plain else Tensor)
        ours = scores.hidden @ scores.head.T if isinstance(scores, States) else scores
        torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    own = model(input_ids=tokens, use_cache=False).logits[:, 40 : 40 + WINDOW]
    torch.testing.assert_close(made[0][: 2 * WINDOW], own.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_no_gradient_flows_through_the_prefix(model: PreTrainedModel) -> None:
    """With the prefix's keys and values attached the gradient is another one, so the oracle would notice."""
    tokens = torch.from_numpy(numbers(1, SEQUENCE, seed=3).astype(np.int64))
    (ours,) = window_scores(model, tokens, (60,), WINDOW, [FULL], NO_LIMIT)
    found = gradients(model, ours.square().mean())
    detached = gradients(model, oracle_logits(model, tokens, 60, FULL).square().mean())
    attached = gradients(model, oracle_logits(model, tokens, 60, FULL, detach=False).square().mean())
    assert_same_gradients(found, detached)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert float((attached[name] - detached[name]).norm() / detached[name].norm()) > 0.01


def test_bfloat16_gradients_reach_every_parameter(
    make_model: Callable[..., PreTrainedModel], data: LabelledSequences
) -> None:
    """The prefill without gradients must not leave casts behind that the forward with gradients reuses."""
    config = config_for({"budgets": {16: 1.0, 32: 1.0}})
    model = make_model(seed=6)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.div_(4)
    objective = MultiView(config, config.train.variants[0], data, [], CPU)
    exact = gradients(model, objective.loss(model, 0, 0)[0])
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective.loss(model, 0, 0)
    rounded = gradients(model, loss)
    for name, gradient in exact.items():
        assert float((rounded[name] - gradient).norm()) < 0.1 * float(gradient.norm()), name


def test_a_variant_with_several_seeds_is_a_drafter_for_each(
    model: PreTrainedModel, data: LabelledSequences
) -> None:
    """One seed is the variant itself; it may differ from the config's."""

    def loss(config: Config, number: int) -> float:
        return MultiView(config, config.train.drafters[number], data, [], CPU).loss(model, 0, 0)[0].item()

    several, plain = (config_for({"budgets": {16: 1.0}, "seeds": seeds}) for seeds in ([5, 6], []))
    assert [v.name for v in several.train.drafters] == ["v~5", "v~6"]
    assert loss(several, 0) == loss(several, 0) != loss(several, 1)
    single = config_for({"budgets": {16: 1.0}, "seeds": [plain.seed]})
    assert [v.name for v in single.train.drafters] == ["v"] and loss(single, 0) == loss(plain, 0)
