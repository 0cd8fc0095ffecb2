"""The losses against textbook formulas over whole distributions, enumeration and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from pipeline.train.losses import LOSSES, TargetLabels

ROWS, VOCABULARY = 7, 13


def logits(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def labels_of(target: Tensor, kept: int, temperature: float) -> TargetLabels:
    """What stage teach stores: the `kept` best entries of the whole distribution at a temperature."""
    top = (target / temperature).log_softmax(-1).topk(kept, dim=-1)
    return TargetLabels(target.argmax(-1), top.indices, top.values, temperature)


def distributions(drafter: Tensor, target: Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(q, p) in double precision, by the definition of softmax."""

    def softmax(values: Tensor) -> np.ndarray:
        powers = np.exp(values.double().numpy() / temperature)
        return powers / powers.sum(-1, keepdims=True)

    return softmax(drafter), softmax(target)


def textbook(name: str, q: np.ndarray, p: np.ndarray) -> np.ndarray:
    if name == "kl":
        return (p * np.log(p / q)).sum(-1)
    return np.abs(p - q).sum(-1) / 2


def test_cross_entropy_is_minus_the_log_probability_of_the_targets_choice() -> None:
    drafter, target = logits(0), logits(1)
    q, p = distributions(drafter, target, 1.0)
    ours = LOSSES["cross_entropy"](drafter, TargetLabels(target.argmax(-1)))
    np.testing.assert_allclose(ours, -np.log(q[np.arange(ROWS), p.argmax(-1)]), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("name", ["kl", "total_variation"])
def test_whole_distributions_give_the_textbook_value(name: str, temperature: float) -> None:
    drafter, target = logits(0), logits(1)
    ours = LOSSES[name](drafter, labels_of(target, VOCABULARY, temperature))
    exact = textbook(name, *distributions(drafter, target, temperature))
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "total_variation"])
def test_stored_entries_give_a_lower_bound_that_grows_with_them(name: str) -> None:
    for seed in range(5):
        drafter, target = logits(seed), logits(seed + 100)
        exact = textbook(name, *distributions(drafter, target, 1.0))
        values = [
            LOSSES[name](drafter, labels_of(target, kept, 1.0)).numpy() for kept in range(1, VOCABULARY + 1)
        ]
        for fewer, more in itertools.pairwise(values):
            assert (fewer <= more + 1e-6).all()
        assert (values[0] >= -1e-6).all() and (values[2] < exact - 1e-3).any()
        np.testing.assert_allclose(values[-1], exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "total_variation"])
def test_a_perfect_drafter_loses_nothing(name: str) -> None:
    target = logits(3)
    np.testing.assert_allclose(LOSSES[name](target, labels_of(target, 4, 1.0)), 0, atol=1e-6)


def test_total_variation_is_one_minus_the_expected_acceptance() -> None:
    """Every proposal with its probability, times the chance that rejection sampling accepts it."""
    drafter, target = logits(4), logits(5)
    q, p = distributions(drafter, target, 0.8)
    ours = LOSSES["total_variation"](drafter, labels_of(target, VOCABULARY, 0.8))
    for row in range(ROWS):
        expected = sum(q[row, x] * min(1.0, p[row, x] / q[row, x]) for x in range(VOCABULARY))
        assert float(ours[row]) == pytest.approx(1 - expected, abs=1e-5)


def test_total_variation_is_the_rejection_rate_of_the_decoder() -> None:
    drafter, target = logits(4)[0], logits(5)[0]
    q, p = drafter.softmax(-1), target.softmax(-1)
    generator = torch.Generator().manual_seed(0)
    runs = 4000
    drawn = torch.multinomial(q, runs, replacement=True, generator=generator)
    uniforms = torch.rand(runs, 2, generator=generator)
    each, _ = reference.rejection_accept(
        drawn.unsqueeze(1), q.expand(runs, 1, -1), p.expand(runs, 2, -1), uniforms
    )
    accepted = int(each.sum())
    loss = LOSSES["total_variation"](drafter[None], labels_of(target[None], VOCABULARY, 1.0))
    deviation = (float(loss) * (1 - float(loss)) / runs) ** 0.5
    assert abs(1 - accepted / runs - float(loss)) < 4 * deviation


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kept", [1, 4, VOCABULARY])
@pytest.mark.parametrize("name", ["cross_entropy", "kl", "total_variation"])
def test_gradients_are_finite_differences(name: str, kept: int, temperature: float) -> None:
    """Differences of the same quantity in double precision, over the stored entries and one bucket."""
    drafter, target = logits(6), logits(7)
    labels = labels_of(target, kept, temperature)
    chosen = labels.ids.numpy()  # type: ignore[union-attr]

    def bucketed(values: np.ndarray) -> np.ndarray:
        listed = np.take_along_axis(values, chosen, -1)
        return np.concatenate([listed, np.maximum(1 - listed.sum(-1, keepdims=True), 1e-300)], -1)

    def total(values: np.ndarray) -> float:
        q, p = distributions(
            torch.from_numpy(values), target, 1.0 if name == "cross_entropy" else temperature
        )
        if name == "cross_entropy":
            return float(-np.log(q[np.arange(ROWS), p.argmax(-1)]).sum())
        if kept == VOCABULARY:
            return float(textbook(name, q, p).sum())
        return float(textbook(name, bucketed(q), bucketed(p)).sum())

    leaf = drafter.clone().requires_grad_()
    LOSSES[name](leaf, labels).sum().backward()
    values, step = drafter.double().numpy(), 1e-5
    numeric = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        nudge = np.zeros_like(values)
        nudge[place] = step
        numeric[place] = (total(values + nudge) - total(values - nudge)) / (2 * step)
    np.testing.assert_allclose(leaf.grad, numeric, atol=2e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_certain_drafter_has_finite_loss_and_gradient(name: str) -> None:
    """Probability 1 on one token, right or wrong, leaves nothing for the tail's bucket."""
    leaf = torch.zeros(ROWS, VOCABULARY)
    leaf[torch.arange(ROWS), torch.arange(ROWS)] = 1e4
    leaf.requires_grad_()
    loss = LOSSES[name](leaf, labels_of(logits(8), 3, 1.0)).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all()  # type: ignore[arg-type]


def test_half_precision_logits_are_compared_in_single() -> None:
    drafter, target = logits(9).bfloat16(), logits(10)
    for name in LOSSES:
        labels = labels_of(target, 5, 1.0)
        assert torch.equal(LOSSES[name](drafter, labels), LOSSES[name](drafter.float(), labels))


@pytest.mark.parametrize("name", ["kl", "total_variation"])
def test_missing_log_probabilities_name_the_setting(name: str) -> None:
    with pytest.raises(ValueError, match=r"labels\.top_k"):
        LOSSES[name](logits(0), TargetLabels(torch.zeros(ROWS, dtype=torch.long)))
