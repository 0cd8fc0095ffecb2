"""The losses against textbook formulas over whole distributions, enumeration and finite differences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from pipeline.train.losses import LOSSES, States, TargetLabels, distinct

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


# ── behind a draft vocabulary ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("listed", ["all", "few"])
@pytest.mark.parametrize("form", ["logits", "states"])
def test_a_draft_vocabulary_against_float64(form: str, listed: str) -> None:
    """Σ over the draft vocabulary with p over the whole one; KL from p renormalised, times its mass there.

    Where all tokens are listed it is exact; else the tail is a bucket that lies inside.
    """
    T, V, D, H, K = 9, 60, 25, 12, 12
    generator = torch.Generator().manual_seed(0)
    tokens_D = torch.randperm(V, generator=generator)[:D].sort().values
    z_p = (3 * torch.randn(T, V, generator=generator)).double()
    if listed == "all":  # the others have no probability
        z_p = z_p.masked_fill(z_p < z_p.topk(K).values[:, -1:], -torch.inf)
    p = z_p.softmax(-1)
    top = p.topk(K)
    labels = TargetLabels(p.argmax(-1), top.indices, top.values.log().float(), 1.0)
    hidden = torch.randn(T, H, generator=generator).requires_grad_()
    head = torch.randn(D, H, generator=generator)
    scores = States(hidden, head) if form == "states" else hidden @ head.T
    inner = labels.within(tokens_D, V)
    z = hidden.detach().double().requires_grad_()
    q = torch.zeros(T, V, dtype=torch.float64).index_copy(1, tokens_D, (z @ head.double().T).softmax(-1))
    inside = torch.isin(top.indices, tokens_D)
    p_in, q_in = top.values * inside, q.gather(1, top.indices) * inside
    p_tail, q_tail = 1 - top.values.sum(1), 1 - q_in.sum(1)
    if listed == "all":  # what is left of either is rounding
        p_tail, q_tail = torch.zeros(T).double(), torch.ones(T).double()
    mass = p_in.sum(1) + p_tail

    def log(values: Tensor) -> Tensor:
        return values.clamp_min(1e-300).log()

    listed_kl = (p_in * (log(p_in / mass.unsqueeze(1)) - log(q_in))).sum(1)
    best = -log(q.gather(1, labels.argmax.unsqueeze(1)).squeeze(1))
    expected = {
        "total_variation": 1 - torch.minimum(p_in, q_in).sum(1) - torch.minimum(p_tail, q_tail),
        "kl": listed_kl + p_tail * (log(p_tail / mass) - log(q_tail)),
        "cross_entropy": best * torch.isin(labels.argmax, tokens_D),
    }
    for name, exact in expected.items():
        ours = LOSSES[name](scores, inner)
        torch.testing.assert_close(ours.double(), exact.detach(), atol=2e-4, rtol=2e-4, msg=name)
        (grad,) = torch.autograd.grad(ours.sum(), hidden, retain_graph=True)
        (exact_grad,) = torch.autograd.grad(exact.sum(), z, retain_graph=True)
        torch.testing.assert_close(grad.double(), exact_grad, atol=1e-3, rtol=1e-3, msg=name)


def test_numbers_that_give_way_are_free_in_their_row() -> None:
    placed = torch.tensor([[-1, 0, 5, -1, 1], [-1, -1, -1, -1, -1], [4, 3, 2, 1, 0], [-1, 2, 9, 3, -1]])
    found = distinct(placed)
    assert torch.equal(found[placed >= 0], placed[placed >= 0])
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 10 for row in found.tolist())


def test_a_vocabulary_of_everything_changes_nothing() -> None:
    p = torch.randn(5, 40).log_softmax(-1)
    top = p.topk(8)
    labels, logits = TargetLabels(p.argmax(-1), top.indices, top.values), torch.randn(5, 40)
    whole = labels.within(torch.arange(40), 40)
    for loss in LOSSES.values():
        torch.testing.assert_close(loss(logits, whole), loss(logits, labels), atol=1e-5, rtol=1e-5)
