"""The lean forms of models against transformers' own, and prefill in chunks against prefill at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kernels import dispatch
from pipeline.axes import FULL, View
from pipeline.decode.lean import LeanModel
from pipeline.decode.model import ModuleModel, decode_model
from pipeline.errors import BadData
from pipeline.kv.slot_cache import SlotCache
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import view_of
from pipeline.models.build import prepare_model
from tests.helpers.models import VOCABULARY, random_tokens
from tests.helpers.pairs import make_pair, plain_tokens, rounds_of, tokens_of

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama-yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32,
        }
    },
    "olmo2": {},
    "llama-dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    },
}  # fmt: skip


def make(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A random model under our attention, and the same weights under transformers' own."""
    config = AutoConfig.for_model(
        name.split("-")[0],
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=name != "qwen2",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
        **ARCHITECTURES[name],
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="budgetdraft")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    twin = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    twin.load_state_dict(model.state_dict())
    return prepare_model(model, VOCABULARY), twin.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_decoding_equals_transformers(name: str) -> None:
    """Logits over a static cache, in two passes of different lengths, against one plain forward."""
    model, twin = make(name)
    expected = twin(input_ids=(tokens := random_tokens(2, 60))).logits
    fast = decode_model(model)
    assert type(fast) is (ModuleModel if name in ("olmo2", "llama-dynamic") else LeanModel)
    assert fast.frequencies is not None, "by which entries that are chosen again can be moved"
    torch.testing.assert_close(fast.frequencies, model.base_model.rotary_emb.inv_freq)
    (view,), logits = fast.prefill(tokens[:, :50], [(50, FULL)])
    torch.testing.assert_close(logits, expected[:, 49], atol=1e-4, rtol=1e-4)
    cache = SlotCache(fast.geometry, 2, 64, 12, fast.rotation)
    for row in range(2):
        part = copy.copy(view)
        part.layers = [(keys[row : row + 1], values[row : row + 1]) for keys, values in view.layers]
        cache.load_row(row, part)
    step = torch.zeros(2, dtype=torch.long)
    first = fast.logits(fast.hidden(tokens[:, 50:53], step, cache))
    rest = fast.logits(fast.hidden(tokens[:, 53:], step + 3, cache))
    torch.testing.assert_close(torch.cat([first, rest], 1), expected[:, 50:], atol=1e-4, rtol=1e-4)
    # The module's weights are the lean model's memory, and still its own.
    torch.testing.assert_close(
        model(input_ids=tokens, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["olmo2", "llama-dynamic"])
def test_other_architectures_speculate_losslessly_but_do_not_compile(name: str) -> None:
    model, _ = make(name)
    pair = make_pair(model, make("llama")[0], [random_tokens(1, 40)], view_of("chunk_topk", 16), 20)
    assert tokens_of(pair, rounds_of(pair, 3, 16)) == plain_tokens(pair, 16)
    with pytest.raises(BadData, match=r"decode\.compile: inductor is for Llama, Mistral, Qwen2 and Qwen3"):
        make_pair(model, model, [random_tokens(1, 40)], FULL, 20, "inductor")


def test_sliding_windows_are_refused() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mistral", vocab_size=VOCABULARY, num_key_value_heads=2, **shape)
    assert config.sliding_window == 4096
    model = AutoModelForCausalLM.from_config(config, attn_implementation="budgetdraft")
    with pytest.raises(ValueError, match="attention with a sliding window is not supported"):
        decode_model(prepare_model(model, VOCABULARY))


VIEWS = [FULL, view_of("chunk_topk", 24), view_of("streaming", 16), view_of("snapkv", 24), view_of("x", 0)]


@pytest.mark.parametrize("chunk", [7, 16, 30, 61, 4096])
def test_prefill_in_chunks_equals_transformers_at_once(drafter: PreTrainedModel, chunk: int) -> None:
    """All views, one of them cut before the end, and the last logits."""
    tokens = random_tokens(2, 61)
    cuts: list[tuple[int, View]] = [(61, view) for view in VIEWS] + [(37, view_of("snapkv", 16))]
    expected, logits = read_prefix(drafter, tokens, cuts)
    found, last = LeanModel(drafter, chunk).prefill(tokens, cuts)
    torch.testing.assert_close(last, logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.view, ours.prefix_tokens, ours.kept) == (theirs.view, theirs.prefix_tokens, theirs.kept)
        torch.testing.assert_close(ours.layers, theirs.layers, atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and "view" not in str(func):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_chunk_bounds_what_prefill_holds(make_model: Any) -> None:
    """Nothing is larger than one layer's KV or hidden states; a wide MLP would be, taken at once."""
    model = make_model(layers=2, hidden=32, mlp=16)
    tokens, S = random_tokens(1, 512), 512
    kv = 2 * S * 2 * (32 // 4)
    sizes = {}
    for chunk in (32, 4096):
        with Largest() as largest:
            LeanModel(model, chunk).prefill(tokens, [(S, view_of("chunk_topk", 16))])
        sizes[chunk] = largest.elements
    assert sizes[32] <= max(kv, S * 32, 2 * 32 * 512)
    assert sizes[4096] >= S * 2 * 512 > 10 * sizes[32] // 2


def test_a_choice_of_kernels_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    dispatch._resolve.cache_clear()
    try:
        dispatch.choose("triton")
        with pytest.raises(ValueError, match=r"run\.kernels is triton, which needs a CUDA device"):
            dispatch.backend(torch.device("cpu"))
        dispatch.choose("auto")
        assert dispatch.backend(torch.device("cpu")) == "torch"
        assert dispatch.backend(torch.device("cuda")) == "triton"
        dispatch.choose("torch")
        assert dispatch.backend(torch.device("cuda")) == "torch"
    finally:
        dispatch.choose("auto")
        dispatch._resolve.cache_clear()
