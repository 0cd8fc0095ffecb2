"""The path term against paths that are sampled, scored and weighted one at a time, by dense forwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import reference
from pipeline.axes import FULL, View
from pipeline.config.train import Paths
from pipeline.decode.model import decode_model
from pipeline.decode.sampling import Rule
from pipeline.kv.views import view_of
from pipeline.models.draft_vocabulary import draft_tokens, restrict
from pipeline.models.heads.begin import head_of
from pipeline.train.batches import LabelledSequences, Windows, batch_indices, draw
from pipeline.train.chained_views import ChainedViews
from pipeline.train.objectives import MultiView
from pipeline.train.paths import PathTerm, expected_accepted, kl, shares, still_open
from pipeline.train.windows import sampled_paths
from tests.helpers.dense import assert_same_gradients, dense_logits, gradients
from tests.helpers.feature_heads import OPTIONS, six_layers
from tests.helpers.models import sharpen
from tests.helpers.tiny import VOCABULARY, Workshop, losses, numbers, tiny_config, weights
from tests.helpers.training import CPU, SEQUENCE, config_for
from tests.helpers.zoo import our_model, tiny

ENDS = frozenset(range(3, 15))  # so many that some paths go beyond one
PATH: dict[str, Any] = {"every": 3, "paths": 3, "length": 4}
INSIDE = torch.arange(5, 60)
HEADED: dict[str, Any] = {
    "target.layers": 6, "drafter": {"kind": "head"}, "data.sequence_tokens": SEQUENCE, "labels.top_k": 6,
    "train.window_tokens": 12, "train.windows": 2, "train.chain_steps": 2,
}  # fmt: skip


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return sharpen(make_model(layers=2, seed=4), 3.0).double().train()


@pytest.fixture
def scorer(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return sharpen(make_model(layers=3, seed=8), 3.0).double()


def drawn_token(q_D: Tensor, uniform: float) -> int:
    """The first whose cumulative share exceeds the number."""
    total = 0.0
    for token, share in enumerate(q_D.tolist()):
        total += share
        if total > uniform:
            return token
    raise AssertionError("the shares add up to one")


def term_of(
    spec: Paths, log_q_PTD: Tensor, log_p_PTV: Tensor, chosen_PT: list[list[int]], tokens_D: Tensor
) -> Tensor:
    """The term of one start, token by token."""
    accepted, likelihood, divergence, count = [], [], torch.zeros(()).double(), 0
    for chosen, log_q_TD, log_p_TV in zip(chosen_PT, log_q_PTD, log_p_PTV, strict=True):
        reached, length, total = 1.0, 0.0, torch.zeros(()).double()
        for token, log_q_D, log_p_V in zip(chosen, log_q_TD, log_p_TV, strict=True):
            p_D = log_p_V.exp()[tokens_D]
            reached *= min(1.0, float(p_D[token]) / float(log_q_D[token].detach().exp()))
            length, total, count = length + reached, total + log_q_D[token], count + 1
            mass = p_D.sum()
            divergence = divergence + mass * (p_D / mass * ((p_D / mass).log() - log_q_D)).sum()
            if int(tokens_D[token]) in ENDS:
                break
        accepted.append(length)
        likelihood.append(total / spec.length)
    weighed = sum(
        (a / sum(accepted) * value for a, value in zip(accepted, likelihood, strict=True)), torch.zeros(())
    )
    return spec.kl_weight * divergence / count - weighed


def oracle(
    spec: Paths,
    starts: Sequence[tuple[int, int]],
    uniforms_TPN: np.ndarray,
    drafter_logits: Callable[[int, int, list[int]], Tensor],
    target: PreTrainedModel,
    data: LabelledSequences,
    tokens_D: Tensor,
) -> Tensor:
    """Mean term over starts, (row, start) pairs.

    Args:
        drafter_logits: of (row, start, ids of a path so far), the next token's.
    """
    terms = []
    for number, (row, start) in enumerate(starts):
        all_chosen, all_q, all_p = [], [], []
        for path in range(spec.paths):
            chosen: list[int] = []
            log_q = []
            for step in range(spec.length):
                logits_D = drafter_logits(row, start, tokens_D[chosen].tolist())
                log_q.append((logits_D.double() / spec.temperature).log_softmax(-1))
                chosen.append(drawn_token(log_q[-1].exp(), float(uniforms_TPN[step, path, number])))
            with torch.no_grad():
                text = torch.cat([data.tokens.rows([row])[:, : start + 1], tokens_D[chosen][None]], 1)
                logits_TV = dense_logits(target, text, start, FULL)[0, :-1].double()
            all_chosen.append(chosen)
            all_q.append(torch.stack(log_q))
            all_p.append((logits_TV / spec.temperature).log_softmax(-1))
        terms.append(term_of(spec, torch.stack(all_q), torch.stack(all_p), all_chosen, tokens_D))
    return torch.stack(terms).mean()


VARIANTS: list[dict[str, Any]] = [
    {"budgets": {16: 0.5, 32: 0.5}, "path": PATH},
    {"sparse_weight": 0, "path": PATH | {"weight": 0.3, "temperature": 0.6}},
    {"budgets": {24: 1.0}, "policy": "window", "sinks": 4, "path": PATH | {"kl_weight": 0}},
    {"budgets": {16: 1.0}, "policy": "streaming", "path": PATH | {"kl_weight": 2.5}, "draft": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=["chunks", "full", "window", "draft_vocabulary"])
def test_the_term_and_its_gradients_are_the_oracles(
    model: PreTrainedModel, scorer: PreTrainedModel, data: LabelledSequences, variant: dict[str, Any]
) -> None:
    draft = variant.get("draft", False)
    config = config_for({name: value for name, value in variant.items() if name != "draft"})
    spec, (drafter,) = config.train.variants[0].path, config.train.variants
    assert spec is not None
    if draft:
        restrict(model, INSIDE)
    tokens_D = INSIDE if draft else torch.arange(VOCABULARY)
    step, micro = 3, 1
    objective = MultiView(config, drafter, data, [], CPU, PathTerm(spec, decode_model(scorer), ENDS))
    total, told = objective.loss(model, step, micro)
    branches = drafter.full_weight * told["full"] + drafter.sparse_weight * told["sparse"]
    torch.testing.assert_close(total, branches + told["path"])
    ours = gradients(model, told["path"])

    rows = batch_indices(len(data), 4, config.seed, step)[2:]
    drawn = draw(drafter, config.train, SEQUENCE, config.seed, step, micro)
    rng = np.random.default_rng([config.seed, step, micro, 1])
    budgets = [budget for budget, times in drawn.budgets.items() for _ in range(times)]
    view = FULL
    if budgets:
        view = view_of(drafter.policy, budgets[rng.integers(len(budgets))], drafter.sinks)
    starts = [(row, start) for start in drawn.starts for row in rows]
    uniforms = rng.random((spec.length, spec.paths * len(starts)), dtype=np.float32)

    def drafter_logits(row: int, start: int, path: list[int]) -> Tensor:
        tokens = data.tokens.rows([row])[:, : start + 1]
        return dense_logits(model, torch.cat([tokens, torch.tensor([path]).long()], 1), start, view)[0, -1]

    shape = (spec.length, spec.paths, len(starts))
    theirs = spec.weight * oracle(
        spec, starts, uniforms.reshape(shape), drafter_logits, scorer, data, tokens_D
    )
    torch.testing.assert_close(told["path"].double(), theirs.double(), atol=1e-6, rtol=1e-5)
    assert_same_gradients(ours, gradients(model, theirs))
    assert objective.loss(model, step + 1, micro)[1]["path"] == 0
    assert objective.loss(model, step, micro)[1]["path"] == told["path"], "a step's paths are always the same"
    assert objective.loss(model, step, 0)[1]["path"] != objective.loss(model, step + 3, 0)[1]["path"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_of_a_head_the_paths_are_its_chains(data: LabelledSequences, options: dict[str, bool]) -> None:
    """Against its chains along texts that hold the path already."""
    target = six_layers(3)
    head = head_of(target, INSIDE, **options).train()
    variant = {"budgets": {16: 0.5, 24: 0.5}, "path": PATH}
    config = tiny_config(HEADED | {"train.variants": [{"name": "v", **variant}]})
    spec, (drafter,) = config.train.variants[0].path, config.train.variants
    assert spec is not None
    noise = torch.randn(len(data), SEQUENCE, 3 * 48, generator=torch.Generator().manual_seed(3))

    class Noise:
        def of_rows(self, rows: Sequence[int], tokens_BL: Tensor) -> Tensor:
            return noise[list(rows)]

        def of_text(self, number: int, tokens_1S: Tensor) -> Tensor:
            raise AssertionError("nothing is validated here")

    term = PathTerm(spec, decode_model(target), ENDS)
    objective = ChainedViews(config, drafter, data, [], CPU, Noise(), term)
    _, told = objective.loss(head, 0, 0)
    ours = torch.autograd.grad(told["path"], list(head.parameters()))

    rows = batch_indices(len(data), 4, config.seed, 0)[:2]
    drawn = draw(drafter, config.train, SEQUENCE, config.seed, 0, 0)
    rng = np.random.default_rng([config.seed, 0, 0, 1])
    budgets = [budget for budget, times in drawn.budgets.items() for _ in range(times)]
    view = view_of(drafter.policy, budgets[rng.integers(len(budgets))])
    starts = [(row, start) for start in drawn.starts for row in rows]
    uniforms = rng.random((spec.length, spec.paths * len(starts)), dtype=np.float32)

    def drafter_logits(row: int, start: int, path: list[int]) -> Tensor:
        text = data.tokens.rows([row]).clone()
        text[0, start + 1 : start + 1 + len(path)] = torch.tensor(path)
        count = len(path) + 1
        return head(text, noise[[row]], [start], count, [view], count, True)[-1][0, 0]

    shape = (spec.length, spec.paths, len(starts))
    theirs = oracle(spec, starts, uniforms.reshape(shape), drafter_logits, target, data, INSIDE)
    assert float(told["path"].detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
    for (name, _), mine, other in zip(
        head.named_parameters(), ours, torch.autograd.grad(theirs, list(head.parameters())), strict=True
    ):
        scale = float(other.abs().max())
        torch.testing.assert_close(mine, other, atol=1e-4 * scale, rtol=1e-3, msg=name)


# ── what paths are worth ──────────────────────────────────────────────────────────────────────────


def test_expected_lengths_and_weights_by_hand() -> None:
    p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.9, 0.9], [0.4, 0.4, 0.4]])
    q = torch.tensor([[0.25, 0.4, 0.4], [0.2, 0.3, 0.9], [0.4, 0.4, 0.8]])
    tokens = torch.tensor([[8, 8, 8], [8, 8, 8], [8, 9, 8]])
    open_RT = still_open(tokens, torch.tensor([9, 11]))
    assert open_RT.tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    lengths = expected_accepted(p.log(), q.log(), open_RT)
    expected = [1 + 0.5 + 0.5 * 0.75, 0.5 + 0.5 + 0.5, 1 + 1]
    torch.testing.assert_close(lengths, torch.tensor(expected))
    torch.testing.assert_close(shares(lengths.unsqueeze(1))[:, 0], torch.tensor(expected) / sum(expected))
    assert shares(torch.zeros(3, 2)).tolist() == [[0, 0]] * 3


def test_the_expected_length_is_the_acceptance_loops_mean() -> None:
    """Of paths as they are, over the numbers that decide; a text that ends ends its round."""
    T, count = 4, 20_000
    generator = torch.Generator().manual_seed(5)
    q_TV, p_TV = (torch.rand(1 + T, 6, generator=generator).softmax(-1) for _ in range(2))
    for path, length in (([0, 3, 2, 5], 4), ([1, 4, 0, 0], 2)):  # token 4 ends a text
        path_1T = torch.tensor([path])
        log_p, log_q = (values[:T].gather(1, path_1T.T).T.log() for values in (p_TV, q_TV))
        expected = expected_accepted(log_p, log_q, still_open(path_1T, torch.tensor([4])))
        accepted, _ = reference.rejection_accept(
            path_1T.expand(count, T),
            q_TV[:T].expand(count, T, 6),
            p_TV.expand(count, T + 1, 6),
            torch.rand(count, T + 1, generator=generator),
            torch.full((count,), length),
        )
        error = float(accepted.float().std()) / count**0.5
        assert float(expected) == pytest.approx(float(accepted.float().mean()), abs=4 * error) and error > 0


def test_the_divergence_is_torchs_and_of_a_part_the_mass_times_it() -> None:
    log_p, log_q = (
        torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(n)).log_softmax(-1) for n in (1, 2)
    )
    whole = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl(log_p, log_q), whole)
    part, log_q_part = log_p[..., :4], log_q[..., :4].log_softmax(-1)
    mass = part.exp().sum(-1)
    inner = torch.nn.functional.kl_div(
        log_q_part, part.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(kl(part, log_q_part), mass * inner)
    torch.testing.assert_close(kl(part, part.log_softmax(-1)), torch.zeros(2, 3), atol=1e-6, rtol=0)


@torch.no_grad()
def test_paths_have_the_drafters_law(make_model: Callable[..., PreTrainedModel]) -> None:
    """The first token's, and the second's behind the likeliest first, at a temperature; the rest is alike."""
    model, count, start, view = sharpen(make_model(seed=4), 6.0), 4000, 40, View("streaming", 16)
    tokens = torch.from_numpy(numbers(1, SEQUENCE, seed=3).astype(np.int64))
    uniforms = torch.rand(2, count, generator=torch.Generator().manual_seed(7))
    chosen, logits = sampled_paths(model, tokens, [start], view, Rule(0.7), uniforms)
    again, _ = sampled_paths(model, tokens, [start], view, Rule(0.7), uniforms)
    assert (
        torch.equal(chosen, again) and chosen.shape == (count, 2) and logits.shape == (count, 2, VOCABULARY)
    )

    def assert_law(found: Tensor, text: Tensor) -> None:
        q = (dense_logits(model, text, start, view)[0, -1] / 0.7).softmax(-1)
        shares = found.bincount(minlength=VOCABULARY) / len(found)
        noise = (2 / np.pi * q * (1 - q) / len(found)).sqrt().sum()
        assert float((shares - q).abs().sum()) < 1.3 * float(noise)
        assert float((shares - q.roll(1)).abs().sum()) > 3 * float(noise)

    assert_law(chosen[:, 0], tokens[:, : start + 1])
    first = int(chosen[:, 0].mode().values)
    followed = chosen[chosen[:, 0] == first, 1]
    assert_law(followed, torch.cat([tokens[:, : start + 1], torch.tensor([[first]])], 1))


def test_rows_that_are_read_alone_have_their_own_starts(
    model: PreTrainedModel, scorer: PreTrainedModel, data: LabelledSequences
) -> None:
    """As answers are, of several lengths: the mean goes over starts, however they are grouped."""
    config = config_for({"sparse_weight": 0, "path": PATH})
    spec = config.train.variants[0].path
    assert spec is not None
    term = PathTerm(spec, decode_model(scorer), ENDS)
    objective = MultiView(config, config.train.variants[0], data, [], CPU, term)
    drawn = draw(config.train.variants[0], config.train, SEQUENCE, 0, 0, 0)
    groups = [Windows([0], (30,)), Windows([1], (25, 37))]
    found = objective.path_loss(term, model, groups, drawn, 0, 0)
    rng = term.random(objective.seed, 0, 0)
    terms = []
    for windows in groups:
        tokens = data.tokens.rows(windows.rows)
        uniforms = torch.from_numpy(rng.random((4, 3 * len(windows.starts)), dtype=np.float32))
        sampled = sampled_paths(model, tokens, windows.starts, FULL, term.rule, uniforms)
        terms.append(term.losses(tokens, windows.starts, *sampled, draft_tokens(model)))
    assert [len(one) for one in terms] == [1, 2]
    torch.testing.assert_close(found, torch.cat(terms).mean())


@pytest.mark.parametrize("name", ["llama", "granite", "opt"])
def test_the_target_reads_paths_as_it_reads_texts(data: LabelledSequences, name: str) -> None:
    """Of any architecture, behind prefixes of several lengths."""
    large = our_model(tiny(name, max_position_embeddings=SEQUENCE))
    term = PathTerm(Paths(**PATH), decode_model(large), ENDS)
    tokens, starts = data.tokens.rows([0, 1]), (41, 20)
    paths = torch.from_numpy(numbers(12, 4, seed=5).astype(np.int64))
    found = term.read(tokens, starts, paths).unflatten(0, (3, 2, 2))
    for number, start in enumerate(starts):
        for row in range(2):
            for path in range(3):
                text = torch.cat([tokens[row, : start + 1], paths.unflatten(0, (3, 2, 2))[path, number, row]])
                own = large(input_ids=text[None], use_cache=False).logits[0, start:-1, :VOCABULARY]
                torch.testing.assert_close(found[path, number, row], own, atol=1e-4, rtol=1e-4)


def test_bfloat16_gradients_reach_every_parameter(
    make_model: Callable[..., PreTrainedModel], scorer: PreTrainedModel, data: LabelledSequences
) -> None:
    """What samples without gradients must not leave casts behind that the pass with gradients reuses."""
    config = config_for({"budgets": {16: 1.0, 32: 1.0}, "path": PATH})
    spec = config.train.variants[0].path
    assert spec is not None
    term = PathTerm(spec, decode_model(scorer), ENDS)
    model = make_model(seed=6)
    with torch.autocast("cpu", torch.bfloat16):
        _, told = MultiView(config, config.train.variants[0], data, [], CPU, term).loss(model, 0, 0)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients(model, told["path"]).values())


# ── in a job ──────────────────────────────────────────────────────────────────────────────────────


OF_JOB = {"name": "multi_view", "budgets": {16: 0.6, 32: 0.4}, "path": {"every": 2, "length": 3}}
JOB = {"train.variants": [OF_JOB]}


def test_resumed_is_uninterrupted_bit_for_bit(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MultiView.loss
    expected = workshop.train("paths", JOB)

    def stop(self: MultiView, model: PreTrainedModel, step: int, micro: int) -> Any:
        if step == 8 and micro == 1:
            raise KeyboardInterrupt
        return whole(self, model, step, micro)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MultiView, "loss", stop)
        workshop.train("paths-stopped", JOB)
    folder = workshop.train("paths-stopped", JOB)
    assert losses(folder) == losses(expected)
    assert all(row["loss/path"] != 0 for row in losses(expected) if "loss/total" in row)
    ours, theirs = weights(folder), weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = (expected / "model" / "README.md").read_text()
    assert "(cross_entropy) + 1·path (4 of 3 tokens, every 2 steps)" in card
