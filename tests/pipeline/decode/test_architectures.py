"""Architectures with heads, windows and rotations of their own: what is decoded is transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL
from pipeline.decode.lean import LeanModel
from pipeline.decode.model import ModuleModel, decode_model
from pipeline.decode.sampling import Rule, Sampler
from pipeline.errors import BadData
from pipeline.kv.slot_cache import SlotCache
from pipeline.kv.views import view_of
from pipeline.models.load import load_model
from pipeline.train.target.labelling import write_ahead
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of, tokens_of
from tests.helpers.zoo import our_model, plain_model, saved, tiny

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 6,
    "long_factor": [3.0] * 6,
    "original_max_position_embeddings": 64,
}
# Of architectures that decode through their modules.
HEADS: list[tuple[str, dict[str, Any]]] = [
    ("granite", {}),
    ("cohere", {}),
    ("gemma3_text", {"sliding_window": 64}),
    ("gpt2", {}),
    ("opt", {}),
    ("mixtral", {}),
    ("mistral", {"sliding_window": 64}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("llama", {"rope_parameters": LONGROPE}),
]
NAMES = [f"{name}-{changes['rope_parameters']['rope_type']}" if "rope_parameters" in changes else name
         for name, changes in HEADS]  # fmt: skip


def loaded(folder: Path, name: str, changes: dict[str, Any], reach: int = 64) -> PreTrainedModel:
    return load_model(saved(tiny(name, **changes), folder, reach=reach), VOCABULARY)


def greedy(model: PreTrainedModel, prompt_1S: Tensor, count: int) -> list[int]:
    """By transformers' own attention, the whole text read anew for each token."""
    text_1S = prompt_1S
    for _ in range(count):
        token_11 = model(input_ids=text_1S, use_cache=False).logits[:, -1:].argmax(-1)
        text_1S = torch.cat([text_1S, token_11], 1)
    return text_1S[0, prompt_1S.shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), HEADS, ids=NAMES)
def test_logits_of_a_step_are_the_models_own(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """Of nine tokens behind a prefix of forty, read in two pieces."""
    model, tokens = loaded(tmp_path, name, changes), random_tokens(1, 49)
    expected = plain_model(tiny(name, **changes))(input_ids=tokens, use_cache=False).logits
    fast = decode_model(model)
    assert isinstance(fast, ModuleModel)
    (view,), logits = fast.prefill(tokens[:, :40], [(40, FULL)])
    torch.testing.assert_close(logits, expected[:, 39], atol=1e-4, rtol=1e-4)
    cache = SlotCache(fast.geometry, 1, 48, 12, fast.rotation)
    cache.load([view])
    step = torch.zeros(1, dtype=torch.long)
    pieces = [
        fast.logits(fast.hidden(tokens[:, 40:44], step, cache)),
        fast.logits(fast.hidden(tokens[:, 44:], step + 4, cache)),
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), expected[:, 40:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "changes"), HEADS, ids=NAMES)
def test_greedy_texts_are_the_models_own(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    model, prompt = loaded(tmp_path, name, changes), random_tokens(1, 40, seed=4)
    pair = make_pair(model, model, [prompt], view_of("streaming", 16), 24)
    expected = greedy(plain_model(tiny(name, **changes)), prompt, 16)
    assert len(set(expected)) > 3, "a text that repeats one token would show little"
    assert plain_tokens(pair, 16) == [expected]
    assert tokens_of(pair, rounds_of(pair, 3, 16)) == [expected]


@torch.no_grad()
@pytest.mark.parametrize("name", ["granite", "cohere", "gemma3_text"])
def test_samples_are_drawn_by_the_models_own_law(tmp_path: Path, name: str) -> None:
    """Each token is the one that transformers' probabilities give for the same random number."""
    changes = {"sliding_window": 64} if name == "gemma3_text" else {}
    model, prompt = decode_model(loaded(tmp_path, name, changes)), random_tokens(2, 20)
    noted = write_ahead(model, prompt, 12, frozenset(), Sampler.seeded(1.0, [5, 6]))
    numbers = Sampler.seeded(1.0, [5, 6])
    texts = torch.tensor([[chosen.token for chosen in row] for row in noted])
    logits = plain_model(tiny(name, **changes))(
        input_ids=torch.cat([prompt, texts], 1), use_cache=False
    ).logits
    own = logits[:, 19:-1].double().log_softmax(-1)
    assert len({chosen.token for row in noted for chosen in row}) > 6, "draws that differ"
    for number in range(12):
        drawn = numbers.uniforms(1)
        assert drawn is not None
        found = (own[:, number].exp().cumsum(-1) < drawn.double()).sum(-1)
        assert found.tolist() == texts[:, number].tolist()
    expected = own.gather(-1, texts.unsqueeze(-1)).squeeze(-1)
    told = torch.tensor([[chosen.log_prob for chosen in row] for row in noted], dtype=torch.float64)
    torch.testing.assert_close(told, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_proposals_are_accepted_by_the_models_own_law(tmp_path: Path) -> None:
    """A drafter that is the target itself is scaled as it is: none of its proposals is refused."""
    model, prompt = loaded(tmp_path, "granite", {}), random_tokens(1, 20)
    pair = make_pair(model, model, [prompt], FULL, 24)
    (rounds,) = rounds_of(pair, 3, 16, sampler=Sampler.seeded(1.0, [3]))
    assert all(one.accepted == one.proposed for one in rounds)
    scaled = Rule(1.0).probabilities(model(input_ids=prompt).logits)
    unscaled = Rule(1.0).probabilities(model(input_ids=prompt).logits * 8)
    assert (scaled - unscaled).abs().max() > 0.05, "the scale makes a difference"


# ── windows and rotations that depend on a text's length ──────────────────────────────────────────

# Layers of both types turn alike.
ALIKE = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
    }
}
WITHOUT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mistral", {"sliding_window": 48}, {"sliding_window": None}),
    (
        "gemma3_text",
        {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"], **ALIKE},
        {"layer_types": ["full_attention"] * 2, **ALIKE},
    ),
]


@pytest.mark.parametrize(("name", "windowed", "plain"), WITHOUT, ids=["mistral", "gemma3_text"])
def test_a_window_that_no_text_reaches_changes_nothing(
    tmp_path: Path, name: str, windowed: dict[str, Any], plain: dict[str, Any]
) -> None:
    texts = []
    for number, changes in enumerate((windowed, plain)):
        model = loaded(tmp_path / str(number), name, changes, reach=48)
        pair = make_pair(model, model, [random_tokens(1, 28)], view_of("chunk_topk", 16), 20)
        texts.append((plain_tokens(pair, 16), rounds_of(pair, 4, 16)))
    assert texts[0] == texts[1]
    with pytest.raises(BadData, match="a sliding window of 48 tokens, and texts get 49 tokens long"):
        loaded(tmp_path / "beyond", name, windowed, reach=49)


@torch.no_grad()
@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_up_to_its_limit_a_rotation_is_the_same_in_every_text(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Texts of 64 tokens, γ included: speculation is lossless, and a long text changes no later one."""
    model = loaded(tmp_path, "llama", {"rope_parameters": rope})

    def text(length: int, seed: int) -> list[int]:
        prompt = random_tokens(1, length, seed)
        pair = make_pair(model, model, [prompt], view_of("streaming", 16), 64 - length)
        (written,) = plain_tokens(pair, 60 - length)
        assert tokens_of(pair, rounds_of(pair, 4, 60 - length)) == [written]
        assert written == greedy(plain_model(tiny("llama", rope_parameters=rope)), prompt, 60 - length)
        return written

    first = text(20, seed=1)
    text(50, seed=2)
    assert text(20, seed=1) == first


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
@pytest.mark.parametrize(("reach", "part"), [(65, "texts get 65 tokens long"), (None, "is not said")])
def test_beyond_it_or_without_a_length_it_is_refused(
    tmp_path: Path, rope: dict[str, Any], reach: int | None, part: str
) -> None:
    ref = saved(tiny("llama", rope_parameters=rope), tmp_path, role="target", reach=reach)
    with pytest.raises(BadData) as caught:
        load_model(ref, VOCABULARY)
    told = str(caught.value)
    assert told.startswith(f"cannot run the target '{tmp_path}': llama with rope_type {rope['rope_type']}")
    assert "over 64 tokens" in told and part in told


class OwnCode(LlamaForCausalLM):
    """As code that comes with a model: it calls itself a Llama."""


def test_only_transformers_own_llamas_are_run_without_their_modules() -> None:
    model = our_model(tiny("llama"))
    assert isinstance(decode_model(model), LeanModel)
    model.__class__ = OwnCode
    assert isinstance(decode_model(model), ModuleModel)
