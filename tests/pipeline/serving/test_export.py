"""Drafters as engines load them: the written contract, and a head run from its exported folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.errors import BadData
from pipeline.models.draft_vocabulary import restrict
from pipeline.models.export import export_model
from pipeline.models.heads.begin import head_of
from pipeline.models.heads.eagle import FeatureHead
from pipeline.serving.export import export_for
from tests.helpers.feature_heads import OPTIONS, six_layers
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer

PROPOSABLE = torch.arange(5, 95, 3)


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return six_layers(4, num_hidden_layers=8)


def saved_head(
    target: PreTrainedModel, folder: Path, tokens: Tensor = PROPOSABLE, **options: Any
) -> FeatureHead:
    head = head_of(target, tokens, **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in head.parameters():
            weight += 0.05 * torch.randn_like(weight)
    export_model(head, tiny_tokenizer(), folder)
    return head


class EngineHead:
    """An EAGLE-3 head as an engine runs it: from config.json and tensors by their names, nothing else.

    One sequence, slot by slot; slot i reads token i + 1 beside the features of token i.
    """

    def __init__(self, folder: Path, embedding: Tensor) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights, self.embedding = load_file(folder / "model.safetensors"), embedding
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x * (x.square().mean() + self.config["rms_norm_eps"]).rsqrt() * self.weights[f"{name}.weight"]

    def rotate(self, x_HD: Tensor, position: int) -> Tensor:
        half = x_HD.shape[-1] // 2
        angles = position * self.config["rope_theta"] ** (-torch.arange(half) / half)
        left, right = x_HD[:, :half], x_HD[:, half:]
        return torch.cat(
            [left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], -1
        )

    def fuse(self, features: Tensor) -> Tensor:
        if self.config["fc_norm"]:
            features = torch.cat(
                [self.norm(f"fc_norm.{i}", third) for i, third in enumerate(features.chunk(3))]
            )
        return self.weights["fc.weight"] @ features

    def step(self, token: int, g: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over the target's vocabulary, and what is fed back."""
        layer, width = "midlayer", self.config["head_dim"]
        normed = self.norm(f"{layer}.hidden_norm", g)
        both = torch.cat([self.norm(f"{layer}.input_layernorm", self.embedding[token]), normed])
        query, key, value = (
            (self.weights[f"{layer}.self_attn.{name}_proj.weight"] @ both).view(-1, width) for name in "qkv"
        )
        position = len(self.keys)
        self.keys.append(self.rotate(key, position))
        self.values.append(value)
        first = max(0, position + 1 - self.config.get("sliding_window", position + 1))
        keys, values = torch.stack(self.keys[first:], 1), torch.stack(self.values[first:], 1)
        groups = query.shape[0] // key.shape[0]
        keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
        scores = torch.einsum("hd,hsd->hs", self.rotate(query, position), keys) / width**0.5
        attended = torch.einsum("hs,hsd->hd", scores.softmax(-1), values).flatten()
        residual = normed if self.config["norm_before_residual"] else g
        z = residual + self.weights[f"{layer}.self_attn.o_proj.weight"] @ attended
        x = self.norm(f"{layer}.post_attention_layernorm", z)
        gate = F.silu(self.weights[f"{layer}.mlp.gate_proj.weight"] @ x)
        z = z + self.weights[f"{layer}.mlp.down_proj.weight"] @ (
            gate * (self.weights[f"{layer}.mlp.up_proj.weight"] @ x)
        )
        out = self.norm("norm", z)
        logits = torch.full((self.config["vocab_size"],), -torch.inf)
        drafted = self.weights["lm_head.weight"] @ out
        ids = torch.arange(len(drafted)) + self.weights.get(
            "d2t", torch.zeros(len(drafted), dtype=torch.long)
        )
        logits[ids] = drafted
        return logits, out if self.config["norm_output"] else z


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("window", [None, 12])
def test_an_exported_head_proposes_what_ours_does(
    target: PreTrainedModel, tmp_path: Path, options: dict[str, bool], window: int | None
) -> None:
    head = saved_head(target, tmp_path / "ours", **options)
    export_for(tmp_path / "ours", tmp_path / "out", "vllm", 8, window)
    tokens = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
    features = torch.randn(1, 40, 3 * 48, generator=torch.Generator().manual_seed(2))
    view = FULL if window is None else View("window", window, sinks=0)
    start, depth = 30, 3
    ours = head(tokens, features, [start], 6, [view], depth, True)
    engine = EngineHead(tmp_path / "out", target.get_input_embeddings().weight)
    for slot in range(start - 1):
        engine.step(int(tokens[0, slot + 1]), engine.fuse(features[0, slot]))
    g = engine.fuse(features[0, start - 1])
    for at in range(depth):
        logits, g = engine.step(int(tokens[0, start + at]), g)
        torch.testing.assert_close(logits[PROPOSABLE], ours[at][0, 0], atol=1e-4, rtol=1e-4)
        assert logits.isinf().sum() == VOCABULARY - len(PROPOSABLE)


def test_the_folder_is_the_contract(target: PreTrainedModel, tmp_path: Path) -> None:
    """Names, shapes and types as engines' loaders want them; anything else is an error there."""
    saved_head(target, tmp_path / "ours", fc_norm=True)
    command = export_for(tmp_path / "ours", tmp_path / "out", "vllm", 8, 64)
    H, inner, D, V = 48, 96, 12, len(PROPOSABLE)
    expected = {
        "fc.weight": (H, 3 * H), "norm.weight": (H,), "lm_head.weight": (V, H),
        "d2t": (V,), "t2d": (VOCABULARY,),
        "midlayer.hidden_norm.weight": (H,), "midlayer.input_layernorm.weight": (H,),
        "midlayer.post_attention_layernorm.weight": (H,),
        "midlayer.self_attn.q_proj.weight": (4 * D, 2 * H),
        "midlayer.self_attn.k_proj.weight": (2 * D, 2 * H),
        "midlayer.self_attn.v_proj.weight": (2 * D, 2 * H),
        "midlayer.self_attn.o_proj.weight": (H, 4 * D), "midlayer.mlp.gate_proj.weight": (inner, H),
        "midlayer.mlp.up_proj.weight": (inner, H), "midlayer.mlp.down_proj.weight": (H, inner),
        **{f"fc_norm.{third}.weight": (H,) for third in range(3)},
    }  # fmt: skip
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert (
        (torch.arange(V) + tensors["d2t"]).tolist()
        == PROPOSABLE.tolist()
        == tensors["t2d"].nonzero()[:, 0].tolist()
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["model_type"] == "llama"
    assert config["layer_types"] == ["sliding_attention"] and config["sliding_window"] == 64
    assert (config["vocab_size"], config["draft_vocab_size"]) == (VOCABULARY, V)
    assert config["max_position_embeddings"] == target.config.max_position_embeddings
    assert "eagle_config" not in config and config["rope_theta"] == 10_000.0
    assert '"method": "eagle3"' in command and "hybrid" not in command
    assert command in (tmp_path / "out" / "README.md").read_text()


def test_the_format_of_speculators_holds_the_same_head(target: PreTrainedModel, tmp_path: Path) -> None:
    """Its config keeps the layer's apart, and its tensors name the layer otherwise; vLLM loads both."""
    saved_head(target, tmp_path / "ours", fc_norm=True, norm_output=True)
    command = export_for(tmp_path / "ours", tmp_path / "native", "vllm", 8, 64)
    other = export_for(tmp_path / "ours", tmp_path / "out", "speculators", 8, 64, target=Path("verifier"))
    assert other == command.replace("native", "out"), "named by its method, which vLLM wants to be told"
    native, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "out"))
    assert ours.keys() == {name.replace("midlayer", "layers.0") for name in native}
    for name, tensor in native.items():
        assert torch.equal(ours[name.replace("midlayer", "layers.0")], tensor)
    flat, nested = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("native", "out"))
    layer = nested["transformer_layer_config"]
    assert nested["speculators_model_type"] == "eagle3" and layer["model_type"] == "llama"
    assert nested["speculators_config"]["verifier"]["name_or_path"] == "verifier"
    for name in (
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
        "rope_theta",
        "sliding_window",
        "layer_types",
    ):
        assert layer[name] == flat[name]
    for name in ("draft_vocab_size", "norm_before_residual", "fc_norm", "norm_output"):
        assert nested[name] == flat[name] and name not in layer
    assert nested["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]


def test_the_format_of_speculators_is_for_heads(tmp_path: Path, make_model: Any) -> None:
    export_model(make_model(layers=2, seed=1), tiny_tokenizer(), tmp_path / "ours")
    with pytest.raises(BadData, match="heads and no draft models: export this one --for vllm"):
        export_for(tmp_path / "ours", tmp_path / "out", "speculators")


def test_a_whole_vocabulary_needs_no_map(target: PreTrainedModel, tmp_path: Path) -> None:
    saved_head(target, tmp_path / "ours", torch.arange(VOCABULARY))
    export_for(tmp_path / "ours", tmp_path / "out", "sglang", 8, 64, 4)
    assert not {"d2t", "t2d"} & load_file(tmp_path / "out" / "model.safetensors").keys()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "sliding_window" not in config  # the server's flags say it
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--speculative-draft-window-size 64 --speculative-draft-sink-size 4" in card


def test_layers_that_a_head_names_are_named_to_the_engine(target: PreTrainedModel, tmp_path: Path) -> None:
    saved_head(target, tmp_path / "ours", feature_layers=[1, 3, 6])
    export_for(tmp_path / "ours", tmp_path / "out", "vllm", 8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}
    with pytest.raises(BadData, match=r"SGLang numbers named layers.*\[2, 4, 5\]"):
        export_for(tmp_path / "ours", tmp_path / "other", "sglang", 8)
    with pytest.raises(BadData, match="--target"):
        export_for(tmp_path / "ours", tmp_path / "other", "vllm")
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "out"}, "something half-written is left"


def test_a_draft_model_is_a_plain_model_behind_a_window(tmp_path: Path, make_model: Any) -> None:
    model = restrict(make_model(layers=2, seed=1), torch.arange(40))
    export_model(model, tiny_tokenizer(), tmp_path / "ours")
    command = export_for(tmp_path / "ours", tmp_path / "out", "vllm", window=32)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention"] * 2 and config["sliding_window"] == 32
    assert '"method": "draft_model"' in command and "--disable-hybrid-kv-cache-manager" in command
    assert "40 tokens" in (tmp_path / "out" / "README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=name)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"window": 64, "sinks": 4}, "vLLM has windows without sinks: the nearest is --window 64 --sinks 0"),
        ({"sinks": 4}, "--sinks goes with --window"),
        ({"window": 4, "sinks": 4}, "they can be 0 to 3"),
    ],
)
def test_a_window_that_an_engine_has_not_is_refused_with_the_nearest(
    target: PreTrainedModel, tmp_path: Path, asked: dict[str, int], words: str
) -> None:
    saved_head(target, tmp_path / "ours")
    with pytest.raises(BadData, match=words):
        export_for(tmp_path / "ours", tmp_path / "out", "vllm", 8, **asked)
    assert not (tmp_path / "out").exists()


def test_rebased_positions_are_no_engines(tmp_path: Path, make_model: Any) -> None:
    model = make_model(layers=1)
    model.config.kept_positions = "rebased"
    model.save_pretrained(tmp_path / "made")
    with pytest.raises(
        BadData, match="positions: rebased, which no engine has: the nearest is anchor_offset"
    ):
        export_for(tmp_path / "made", tmp_path / "served", "sglang", window=16)
    assert not (tmp_path / "served").exists()


def test_a_folder_that_is_none_or_is_there_is_named(target: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(BadData, match="holds no drafter"):
        export_for(tmp_path, tmp_path / "out", "vllm")
    saved_head(target, tmp_path / "ours")
    with pytest.raises(BadData, match="is there already"):
        export_for(tmp_path / "ours", tmp_path / "ours", "vllm", 8)
