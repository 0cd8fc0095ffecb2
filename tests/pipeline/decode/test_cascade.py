"""A cascade against autoregressive decoding, self-speculation and replay; and the law of its three levels."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kernels import dispatch
from pipeline.axes import FULL, View
from pipeline.decode import replay
from pipeline.decode.cascade import CascadeDrafts
from pipeline.decode.loop import autoregressive_noted
from pipeline.decode.model import decode_model
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import GREEDY, Sampler
from pipeline.decode.sources import Proposals
from pipeline.errors import NotFinite
from pipeline.kv.view_cache import ATTENTION, read_prefix
from pipeline.kv.views import view_of
from pipeline.metrics import Counts
from pipeline.models.build import prepare_model
from tests.helpers.cascades import Cascade, make_cascade
from tests.helpers.models import random_tokens, sharpen
from tests.helpers.pairs import NEVER, Pair, plain_tokens, rounds_of, tokens_of

LIMIT = 19
DEPTHS = [(1, 2), (3, 1), (5, 2), (8, 4)]  # outer and inner γ
MIDDLES = [view_of("streaming", 16), view_of("snapkv", 32)]
INNERS = [view_of("streaming", 16), view_of("chunk_topk", 24), FULL]


@pytest.mark.parametrize(
    ("middle", "inner"), [(MIDDLES[0], INNERS[1]), (MIDDLES[1], INNERS[0]), (MIDDLES[1], INNERS[2])]
)
def test_rounds_are_those_of_self_speculation_and_of_its_replay(
    target: PreTrainedModel, drafter: PreTrainedModel, middle: View, inner: View
) -> None:
    """Greedily: the text of autoregressive decoding, and every round, over inner and outer γ."""
    partly = 0
    for seed, (gamma, inner_gamma) in enumerate(DEPTHS):
        prompt = random_tokens(1, 50 + seed, seed)
        held = make_cascade(target, drafter, [prompt], middle, inner, inner_gamma, LIMIT + gamma)
        (plain,) = plain_tokens(held.pair, LIMIT)
        rounds = rounds_of(held.pair, gamma, LIMIT, source=held.source)
        assert tokens_of(held.pair, rounds) == [plain]
        assert rounds == rounds_of(held.pair, gamma, LIMIT)
        views, _ = read_prefix(target, prompt, [(prompt.shape[1], middle)])
        (match,) = replay.match_views(replay.view_logits(target, views, plain), plain)
        assert rounds[0] == replay.rounds(match, plain, gamma, LIMIT, ends_with_eos=False)
        partly += 0 < sum(one.accepted for one in rounds[0]) < sum(one.proposed for one in rounds[0])
    assert partly >= 2


def test_rows_together_are_each_alone(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """Prompts of different lengths, ended by a token of one text, greedy and sampled; also replayed as any
    source is, beginning at every round's place."""
    gamma, inner_gamma = 6, 2
    prompts = [random_tokens(1, 50 + 9 * seed, seed) for seed in range(3)]

    def cascade(of: list[Tensor]) -> Cascade:
        return make_cascade(target, drafter, of, MIDDLES[1], INNERS[0], inner_gamma, LIMIT + gamma)

    together = cascade(prompts)
    eos = frozenset({plain_tokens(together.pair, LIMIT)[1][9]})
    texts = plain_tokens(together.pair, LIMIT, eos)
    assert len({len(text) for text in texts}) > 1
    rounds = rounds_of(together.pair, gamma, LIMIT, eos, source=together.source)
    assert tokens_of(together.pair, rounds) == texts
    sampler = Sampler.seeded(1.1, [5, 6, 7])
    sampled = rounds_of(together.pair, gamma, LIMIT, eos, sampler, source=cascade(prompts).source)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        alone = cascade([prompt])
        assert rounds_of(alone.pair, gamma, LIMIT, eos, source=alone.source)[0] == rounds[row]
        source, ended = cascade([prompt]).source, text[-1] in eos
        assert replay.source_rounds(source, text, gamma, LIMIT, ended) == rounds[row]
        sampler = Sampler.seeded(1.1, [5 + row])
        single = rounds_of(alone.pair, gamma, LIMIT, eos, sampler, source=cascade([prompt]).source)
        assert single[0] == sampled[row]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_drafters_cache_is_that_of_the_text(target: PreTrainedModel, temperature: float) -> None:
    """A drafter that is the middle is always accepted by it, round after round, whatever the target accepts:
    the middle is asked as seldom as can be. One slot of either that is not the text's would show."""
    view, whole = view_of("streaming", 24), 0
    for gamma, inner_gamma in ((1, 1), (2, 1), (3, 2), (4, 3), (5, 2)):
        held = make_cascade(
            target, target, [random_tokens(1, 40, gamma)], view, view, inner_gamma, LIMIT + gamma
        )
        sampler = Sampler.seeded(temperature, [3])
        with mock.patch.object(held.source.middle, "run", wraps=held.source.middle.run) as asked:
            (rounds,) = rounds_of(held.pair, gamma, LIMIT, sampler=sampler, source=held.source)
        assert asked.call_count == len(rounds) * -(-gamma // (inner_gamma + 1))
        whole += gamma % (inner_gamma + 1) == 0 and any(one.accepted == gamma for one in rounds[:-1])
    assert whole, "all that a drafter proposed was accepted by both, and it went on behind that"


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_compiled_cascades_emit_the_same_tokens(
    target: PreTrainedModel, drafter: PreTrainedModel, temperature: float
) -> None:
    found = []
    for compile in ("none", "inductor"):
        held = make_cascade(
            target,
            drafter,
            [random_tokens(1, 50)],
            MIDDLES[0],
            INNERS[0],
            2,
            LIMIT + 4,
            compile,  # type: ignore[arg-type]
        )
        sampler = Sampler.seeded(temperature, [1])
        found.append(rounds_of(held.pair, 4, LIMIT, sampler=sampler, source=held.source))
    assert found[0] == found[1]


@pytest.fixture
def backends() -> Iterator[tuple[dispatch.Backend, ...]]:
    yield "triton", "torch"
    dispatch.choose("auto")


@pytest.mark.slow
def test_triton_kernels_decode_the_same_text(
    target: PreTrainedModel, drafter: PreTrainedModel, backends: tuple[dispatch.Backend, ...]
) -> None:
    """Through the interpreter where there is no GPU, two rows together, greedily and sampled."""
    device, limit = "cuda" if torch.cuda.is_available() else "cpu", 6
    large, small = (copy.deepcopy(model).to(device) for model in (target, drafter))
    prompts = [random_tokens(1, length, seed).to(device) for seed, length in enumerate((30, 41))]
    found = []
    for backend in backends:
        dispatch.choose(backend)
        held = make_cascade(large, small, prompts, MIDDLES[1], INNERS[0], 2, limit + 3)
        assert held.source.middle.cache.backend == backend
        found.append([
            rounds_of(held.pair, 3, limit, sampler=sampler, source=held.source)
            for sampler in (GREEDY, Sampler.seeded(1.2, [1, 2], device))
        ])  # fmt: skip
    assert found[0] == found[1]


def test_logits_that_are_not_finite_are_an_error(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    """The drafter's too, though the middle would correct what it proposes."""
    broken = copy.deepcopy(drafter)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    for models in ((target, broken), (broken, target)):
        held = make_cascade(*models, [random_tokens(1, 40)], MIDDLES[0], INNERS[0], 2, LIMIT + 3)
        for sampler in (GREEDY, Sampler.seeded(0.8, [1])):
            with pytest.raises(NotFinite, match="not finite near continuation token 1"):
                rounds_of(held.pair, 3, LIMIT, sampler=sampler, source=held.source)


def test_room_is_asked_for_what_is_drafted_beyond(target: PreTrainedModel, drafter: PreTrainedModel) -> None:
    held = make_cascade(target, drafter, [random_tokens(1, 40)], MIDDLES[0], INNERS[0], 2, LIMIT + 3)
    held.source.check_room(LIMIT + 3)
    with pytest.raises(ValueError, match=f"room for {LIMIT + 5} continuation tokens, not {LIMIT + 6}"):
        held.source.check_room(LIMIT + 4)


# ── the law of the three levels, on four tokens ───────────────────────────────────────────────────

TOKENS, GAMMA, ROWS, TEMPERATURE, FIRST = 4, 2, 3000, 1.5, 1
MIDDLE, INNER = view_of("streaming", 16), View("none", 0)


def toy(seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION)
    return prepare_model(sharpen(model, 20.0), TOKENS)


def many(model: PreTrainedModel, prompt: Tensor, view: View, rows: int, room: int) -> Runner:
    """Equal rows: a prompt that is read once."""
    fast = decode_model(model)
    (kept,), _ = fast.prefill(prompt, [(prompt.shape[1], view)])
    runner = Runner(fast, rows, kept.kept, room, "none")
    runner.cache.load([kept] * rows)
    return runner


class Toys:
    """Three models that disagree, and the exact laws of target and middle behind a prompt."""

    def __init__(self) -> None:
        self.target, self.drafter = toy(1), toy(2)
        self.prompt = torch.randint(0, TOKENS, (1, 40), generator=torch.Generator().manual_seed(3))

    def cascade(self, rows: int, limit: int) -> Cascade:
        seen = [(self.target, FULL), (self.target, MIDDLE), (self.drafter, INNER)]
        runners = [many(model, self.prompt, view, rows, limit + GAMMA + 2) for model, view in seen]
        return Cascade(Pair(*runners[:2], [FIRST] * rows), CascadeDrafts(runners[2], runners[1], 2))

    @torch.no_grad()
    def law(self, model: PreTrainedModel, view: View, text: tuple[int, ...]) -> Tensor:
        """[V] of the token behind a text, by a forward pass that has nothing of decoding's steps."""
        views, _ = read_prefix(model, self.prompt, [(self.prompt.shape[1], view)])
        logits_V = replay.view_logits(model, views, [*text, 0])[0, -1]
        return (logits_V.double() / TEMPERATURE).softmax(-1)

    def target_law(self, text: tuple[int, ...]) -> Tensor:
        return self.law(self.target, FULL, text)

    def middle_law(self, text: tuple[int, ...]) -> Tensor:
        return self.law(self.target, MIDDLE, text)


@pytest.fixture(scope="module")
def toys() -> Toys:
    return Toys()


def fits(seen: Counter[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """The p-value of a chi-square test; outcomes that are rare are counted with the last of the others."""
    assert seen.keys() <= exact.keys() and sum(exact.values()) == pytest.approx(1, abs=1e-5)
    total = seen.total()
    common = [outcome for outcome, share in exact.items() if share * total >= 8]
    assert len(common) >= 8
    observed = [seen[outcome] for outcome in common]
    expected = [exact[outcome] * total for outcome in common]
    observed[-1] += total - sum(observed)
    expected[-1] += total - sum(expected)
    return float(chisquare(observed, expected).pvalue)


def test_the_models_disagree(toys: Toys) -> None:
    first = (FIRST,)
    laws = [toys.target_law(first), toys.middle_law(first), toys.law(toys.drafter, INNER, first)]
    for one, other in itertools.combinations(laws, 2):
        assert 0.05 < float((one - other).abs().sum() / 2) < 0.9


def test_proposals_and_their_verification_have_the_joint_law(toys: Toys) -> None:
    """Proposals, how many the target accepts, and its token behind them, jointly: the exact probability of
    each outcome is that the middle alone draws the proposals, times that of rejection sampling by hand."""
    exact: dict[tuple[int, ...], float] = {}
    for drafts in itertools.product(range(TOKENS), repeat=GAMMA):
        chance = 1.0
        for place, token in enumerate(drafts):
            chance *= float(toys.middle_law((FIRST, *drafts[:place]))[token])
        for place, token in enumerate(drafts):
            p, q = (law((FIRST, *drafts[:place])) for law in (toys.target_law, toys.middle_law))
            kept = min(1.0, float(p[token] / q[token]))
            rest = (p - q).clamp_min(0)
            for following in range(TOKENS):
                share = float(rest[following] / rest.sum()) if kept < 1 else 0.0
                exact[*drafts, place, following] = chance * (1 - kept) * share
            chance *= kept
        for following in range(TOKENS):
            exact[*drafts, GAMMA, following] = chance * float(toys.target_law((FIRST, *drafts))[following])
    seen: Counter[tuple[int, ...]] = Counter()
    held = toys.cascade(ROWS, GAMMA + 2)
    for turn in range(2):
        offers: list[Proposals] = []
        source = Recorded(held.source, offers)
        sampler = Sampler.seeded(TEMPERATURE, range(turn * ROWS, (turn + 1) * ROWS))
        rows = rounds_of(held.pair, GAMMA, GAMMA + 2, sampler=sampler, source=source)
        for drafts, (round_, *_) in zip(offers[0].tokens_BT.tolist(), rows, strict=True):
            seen[*drafts, round_.accepted, round_.tokens[-1]] += 1
        # The test was by the middle's own law at each drawing.
        probabilities = offers[0].probabilities_BTV
        assert probabilities is not None
        for row in range(16):
            drafts = offers[0].tokens_BT[row].tolist()
            for place in range(GAMMA):
                law = toys.middle_law((FIRST, *drafts[:place]))
                assert torch.allclose(probabilities[row, place].double(), law, atol=1e-5)
    assert {outcome[GAMMA] for outcome in seen} == set(range(GAMMA + 1))
    assert fits(seen, exact) > 1e-3


class Recorded(CascadeDrafts):
    """A cascade whose offers are kept."""

    def __init__(self, inner: CascadeDrafts, offers: list[Proposals]) -> None:
        super().__init__(inner.drafter, inner.middle, inner.inner_gamma)
        self.offers = offers

    def propose(self, *arguments: object) -> Proposals:
        self.offers.append(super().propose(*arguments))  # type: ignore[arg-type]
        return self.offers[-1]


def test_texts_of_several_rounds_have_the_targets_law(toys: Toys) -> None:
    """Three tokens behind the first, of one to three rounds: what a round throws away biases no other."""
    exact: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(TOKENS), repeat=3):
        laws = [toys.target_law((FIRST, *text[:place]))[token] for place, token in enumerate(text)]
        exact[text] = float(torch.stack(laws).prod())
    sampler = Sampler.seeded(TEMPERATURE, range(50_000, 50_000 + ROWS))
    held = toys.cascade(ROWS, 4)
    rows = rounds_of(held.pair, GAMMA, 4, sampler=sampler, source=held.source)
    assert len({len(rounds) for rounds in rows}) == 3
    texts = [tuple(token for one in rounds for token in one.tokens) for rounds in rows]
    assert fits(Counter(texts), exact) > 1e-3


def test_expected_rounds_are_those_of_self_speculations_replay(toys: Toys) -> None:
    """Acceptance and rounds of sampled cascades against the estimate, over other texts, of the middle."""
    rows, limit = 400, 12
    held, plain = toys.cascade(rows, limit), toys.cascade(100, limit).pair
    sampler = Sampler.seeded(TEMPERATURE, range(rows))
    rounds = rounds_of(held.pair, GAMMA, limit, sampler=sampler, source=held.source)
    decoded = Counts.pooled([Counts.of(row, GAMMA) for row in rounds])

    sampler = Sampler.seeded(TEMPERATURE, range(rows, rows + 100))
    views, _ = read_prefix(toys.target, toys.prompt, [(toys.prompt.shape[1], MIDDLE)])
    expected = []
    for noted in zip(*autoregressive_noted(plain.target, plain.firsts, limit, NEVER, sampler), strict=True):
        text = [FIRST, *(one.token for one in noted if one)]
        log_probs = [0.0, *(one.log_prob for one in noted if one)]
        chances = replay.chances(replay.view_logits(toys.target, views, text), text, log_probs, TEMPERATURE)
        expected += replay.expect(chances, GAMMA, limit, ends_with_eos=False)
    told = Counts.pooled(expected)
    assert decoded.num_proposed and told.num_proposed
    rate = decoded.num_accepted / decoded.num_proposed
    assert 0.1 < rate < 0.9 and rate == pytest.approx(told.num_accepted / told.num_proposed, abs=0.03)
    assert decoded.num_rounds / rows == pytest.approx(told.num_rounds / 100, rel=0.05)
