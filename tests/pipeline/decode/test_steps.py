"""The engine in its forms: compiled, in batches, drafting until unsure. All emit what plain decoding does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from kernels import dispatch
from pipeline.axes import FULL
from pipeline.decode import runner
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import Sampler
from pipeline.errors import BadData, NotFinite
from pipeline.kv.views import view_of
from tests.helpers.models import random_tokens
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of, tokens_of

LIMIT = 24


@pytest.fixture
def triton_kernels():  # type: ignore[no-untyped-def]
    dispatch.choose("triton")
    yield
    dispatch.choose("auto")


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_compiled_decoding_emits_the_same_tokens(
    target: PreTrainedModel, drafter: PreTrainedModel, temperature: float
) -> None:
    found = []
    for compile in ("none", "inductor"):
        texts = []
        for seed in range(2):
            tokens = random_tokens(1, 50 + seed, seed)
            pair = make_pair(target, drafter, [tokens], view_of("chunk_topk", 16), LIMIT + 4, compile)
            texts.append(plain_tokens(pair, LIMIT, sampler=Sampler.seeded(temperature, [seed])))
            texts += [rounds_of(pair, 4, LIMIT, sampler=Sampler.seeded(temperature, [seed]))]
            if temperature == 0:
                assert tokens_of(pair, texts[-1]) == texts[-2]
        found.append(texts)
    assert found[0] == found[1]


def test_compiled_code_is_shared_by_models_views_and_prompts_of_one_shape(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    """Another drafter, policy and prompt bring nothing new to compile; another γ brings its verification."""
    torch._dynamo.reset()
    counters.clear()
    other = copy.deepcopy(drafter)
    compiled = []
    for model, policy, seed, gamma in (
        (drafter, "chunk_topk", 0, 4),
        (drafter, "streaming", 1, 4),
        (other, "snapkv", 2, 4),
        (other, "snapkv", 2, 3),
    ):
        pair = make_pair(
            target, model, [random_tokens(1, 50 + seed, seed)], view_of(policy, 16), LIMIT + 4, "inductor"
        )
        plain_tokens(pair, LIMIT)
        rounds_of(pair, gamma, LIMIT)
        rounds_of(pair, gamma, LIMIT)
        compiled.append(counters["stats"]["unique_graphs"])
    first, *later = (after - before for before, after in zip([0, *compiled], compiled, strict=False))
    assert first == 4, "AR, drafting behind one and behind two unread tokens, verification"
    assert later == [0, 0, 1]


@pytest.mark.parametrize("compile", ["none", "inductor"])
def test_a_batch_emits_what_each_prompt_emits_alone(
    target: PreTrainedModel, drafter: PreTrainedModel, compile: str
) -> None:
    """Prompts of different lengths that accept differently and end at different places."""
    prompts = [random_tokens(1, length, seed) for seed, length in enumerate((40, 57, 40, 33))]
    view, gamma = view_of("chunk_topk", 24), 3
    alone = [make_pair(target, drafter, [prompt], view, LIMIT + gamma) for prompt in prompts]
    texts = [plain_tokens(pair, LIMIT)[0] for pair in alone]
    eos = frozenset({texts[0][7], texts[2][15]})
    expected = [rounds_of(pair, gamma, LIMIT, eos)[0] for pair in alone]
    assert len({len(rounds) for rounds in expected}) > 1, "the rows end in different rounds"
    together = make_pair(target, drafter, prompts, view, LIMIT + gamma, compile)  # type: ignore[arg-type]
    assert plain_tokens(together, LIMIT) == texts
    assert rounds_of(together, gamma, LIMIT, eos) == expected
    assert tokens_of(together, expected) == plain_tokens(together, LIMIT, eos)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_a_sampled_row_draws_the_same_whatever_stands_beside_it(
    target: PreTrainedModel, drafter: PreTrainedModel, threshold: float
) -> None:
    prompts = [random_tokens(1, 40, seed) for seed in range(3)]
    view = view_of("streaming", 16)
    together = make_pair(target, drafter, prompts, view, LIMIT + 3)
    rounds = rounds_of(together, 3, LIMIT, sampler=Sampler.seeded(1.1, [5, 6, 7]), threshold=threshold)
    for row, prompt in enumerate(prompts):
        pair = make_pair(target, drafter, [prompt], view, LIMIT + 3)
        pair.firsts[:] = [together.firsts[row]]
        sampler = Sampler.seeded(1.1, [5 + row])
        assert rounds_of(pair, 3, LIMIT, sampler=sampler, threshold=threshold)[0] == rounds[row]


@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_drafting_until_unsure_compiles(
    target: PreTrainedModel, drafter: PreTrainedModel, temperature: float
) -> None:
    found = []
    for compile in ("none", "inductor"):
        pair = make_pair(
            target, drafter, [random_tokens(1, 45)], view_of("chunk_topk", 16), LIMIT + 6, compile
        )
        sampler = Sampler.seeded(temperature, [3])
        found.append(rounds_of(pair, 6, LIMIT, sampler=sampler, threshold=0.15))
    assert found[0] == found[1] and len({one.proposed for one in found[0][0]}) > 1


@pytest.mark.parametrize("rows", [1, 3])
def test_drafting_until_unsure_is_lossless_and_verifies_the_token_it_stops_at(
    target: PreTrainedModel, drafter: PreTrainedModel, rows: int
) -> None:
    prompts = [random_tokens(1, 45, seed) for seed in range(rows)]
    pair = make_pair(target, drafter, prompts, view_of("chunk_topk", 16), LIMIT + 6)
    plain, fixed = plain_tokens(pair, LIMIT), rounds_of(pair, 6, LIMIT)
    lengths = set()
    for threshold in (0.2, 0.5, 0.9):
        rounds = rounds_of(pair, 6, LIMIT, threshold=threshold)
        assert tokens_of(pair, rounds) == plain
        lengths |= {one.proposed for row in rounds for one in row}
        assert sum(one.proposed for row in rounds for one in row) < sum(
            one.proposed for row in fixed for one in row
        )
    assert {1, 2} <= lengths and max(lengths) <= 6
    # A threshold that nothing reaches stops behind every first proposal: that one is verified.
    once = rounds_of(pair, 6, LIMIT, threshold=0.999999)
    assert {one.proposed for row in once for one in row} == {1}
    assert any(one.accepted for row in once for one in row)
    assert once == rounds_of(pair, 1, LIMIT)


@torch.no_grad()
def test_sampling_until_unsure_keeps_the_targets_distribution(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    """The second token over many seeds. Dropping the unsure proposal would show: it favours the sure ones."""
    tokens, temperature, runs = random_tokens(1, 24), 6.0, 1500
    pair = make_pair(target, drafter, [tokens], view_of("streaming", 16), 8)
    exact = target(torch.cat([tokens, torch.tensor([pair.firsts])], 1)).logits[0, -1] / temperature
    counts = torch.zeros(exact.shape[0])
    for seed in range(runs):
        sampler = Sampler.seeded(temperature, [seed])
        (rounds,) = rounds_of(pair, 3, 3, sampler=sampler, threshold=0.05)
        counts[rounds[0].tokens[0]] += 1
    plain = torch.multinomial(
        exact.softmax(-1), runs, replacement=True, generator=torch.Generator().manual_seed(0)
    ).bincount(minlength=len(counts))

    def distance(observed: torch.Tensor) -> float:
        return float((observed / runs - exact.softmax(-1)).abs().sum() / 2)

    assert distance(counts) < 1.3 * distance(plain) + 0.01


def test_triton_kernels_decode_the_same_text(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    triton_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the interpreter where there is no GPU: the whole path, with its operators, in a batch."""
    prompts = [random_tokens(1, length, seed) for seed, length in enumerate((30, 41))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large, small = (copy.deepcopy(model).to(device) for model in (target, drafter))
    given = [prompt.to(device) for prompt in prompts]
    limit, view = 8, view_of("chunk_topk", 16)
    pair = make_pair(large, small, given, view, limit + 3)
    assert pair.target.cache.backend == "triton"
    texts = plain_tokens(pair, limit), rounds_of(pair, 3, limit)
    sampled = rounds_of(pair, 3, limit, sampler=Sampler.seeded(1.2, [1, 2], device))
    dispatch.choose("torch")
    pair = make_pair(large, small, given, view, limit + 3)
    assert pair.target.cache.backend == "torch"
    assert texts == (plain_tokens(pair, limit), rounds_of(pair, 3, limit))
    assert sampled == rounds_of(pair, 3, limit, sampler=Sampler.seeded(1.2, [1, 2], device))


def test_triton_operators_compile_whole(target: PreTrainedModel, triton_kernels: None) -> None:
    tokens = random_tokens(1, 30)
    expected = plain_tokens(make_pair(target, target, [tokens], FULL, 10), 6)
    pair = make_pair(target, target, [tokens], FULL, 10, "inductor")
    assert plain_tokens(pair, 6) == expected
    assert tokens_of(pair, rounds_of(pair, 2, 6)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_captured_decoding_emits_the_same_tokens(
    target: PreTrainedModel, drafter: PreTrainedModel, temperature: float
) -> None:
    large, small = (copy.deepcopy(model).to("cuda") for model in (target, drafter))
    tokens, found = random_tokens(1, 50).to("cuda"), []
    for compile in ("none", "cudagraphs"):
        pair = make_pair(large, small, [tokens], view_of("chunk_topk", 16), LIMIT + 4, compile)  # type: ignore[arg-type]
        for _ in range(2):
            sampler = Sampler.seeded(temperature, [3], "cuda")
            found.append((plain_tokens(pair, LIMIT, sampler=sampler), rounds_of(pair, 4, LIMIT)))
    assert all(text == found[0] for text in found)


def test_nan_names_the_model_that_gave_it(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    broken = copy.deepcopy(drafter)
    broken.name_or_path = "the-broken-one"
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    for pair in ((target, broken), (broken, target)):
        held = make_pair(*pair, [random_tokens(1, 30)], FULL, 12)
        with pytest.raises(NotFinite, match="the-broken-one: logits not finite near continuation token 1"):
            rounds_of(held, 3, 9)


def test_a_cache_is_clean_after_logits_that_were_not_finite(
    target: PreTrainedModel, drafter: PreTrainedModel
) -> None:
    """NaN in a buffer would spread: a weight of 0 times NaN is NaN."""
    pair = make_pair(target, drafter, [random_tokens(1, 40)], FULL, 16)
    expected = rounds_of(pair, 3, 12)
    views, _ = pair.drafter.model.prefill(random_tokens(1, 40), [(40, FULL)])
    for buffer in (*pair.drafter.cache.keys, *pair.drafter.cache.values):
        buffer.fill_(float("nan"))
    pair.drafter.cache.load(views)
    assert rounds_of(pair, 3, 12) == expected


def test_what_cannot_be_compiled_says_so(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decode_model(target)
    monkeypatch.setattr(runner.shutil, "which", lambda name: None)
    with pytest.raises(BadData, match=r"inductor needs a C\+\+ compiler on a CPU: install g\+\+"):
        Runner(model, 1, 64, 8, "inductor")
    if not torch.cuda.is_available():
        with pytest.raises(BadData, match="cudagraphs needs a CUDA device; set inductor or none"):
            Runner(model, 1, 64, 8, "cudagraphs")
    with pytest.raises(ValueError, match="the cache has 1 rows, not 2"):
        pair = make_pair(target, target, [random_tokens(1, 30)], FULL, 10)
        pair.firsts.append(3)
        plain_tokens(pair, 6)
    with pytest.raises(ValueError, match="room for 10 continuation tokens, not 12"):
        rounds_of(make_pair(target, target, [random_tokens(1, 30)], FULL, 10), 4, 8)
