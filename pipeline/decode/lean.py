"""The Llama family as functions over its weights: Llama, Mistral, Qwen2, Qwen3.

Projections that read the same input are one matrix product, norms are one operation, and a step is a dozen
calls a layer. This makes plain eager decoding of small models fast, and leaves the compiler nothing to trip
over. The weights share the memory of the transformers module, which goes on working beside it.

Prefill goes layer by layer, in chunks of `prefill_chunk` tokens within a layer: beside the views that are
kept and the hidden states of one layer, it holds one layer's KV and a chunk's activations.

Shape legend: B rows, S prefix length, Q new tokens, C hidden width, F width of the features, H key/value
heads, G query heads per key/value head, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kernels import dispatch
from pipeline.axes import FULL, View
from pipeline.decode.products import Linear, choose_forms
from pipeline.kv.attention import Span, causal_attention, suffix_attention, windowed_attention
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.policies import SNAP_WINDOW
from pipeline.kv.slot_cache import Geometry, SlotCache, SlotIndex
from pipeline.kv.views import PrefixView, readings
from pipeline.models.draft_vocabulary import among_all, draft_tokens


def fuse(*linears: nn.Linear) -> Linear:
    """Layers that read the same input, as one layer; their parameters become parts of its memory.

    Layers that were fused before lie side by side in memory and are taken as they are.
    """
    if len(linears) == 1:
        (linear,) = linears
        return Linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
    sizes = [linear.weight.shape[0] for linear in linears]
    parts = [linear.weight.detach() for linear in linears]
    whole = {part.untyped_storage().data_ptr() for part in parts}
    if len(whole) == 1 and all(b.data_ptr() == a.data_ptr() + a.nbytes for a, b in pairwise(parts)):
        weight = parts[0].as_strided((sum(sizes), parts[0].shape[1]), parts[0].stride())
    else:
        weight = torch.cat(parts)
        for linear, part in zip(linears, weight.split(sizes), strict=True):
            linear.weight.data = part
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return Linear(weight, None)
    return Linear(
        weight,
        torch.cat(
            [
                weight.new_zeros(n) if bias is None else bias.detach()
                for bias, n in zip(biases, sizes, strict=True)
            ]
        ),
    )


class LeanLayer(NamedTuple):
    """One decoder layer's weights; `query_norm` and `key_norm` are Qwen3's."""

    input_norm: Tensor
    query_key_value: Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Lean:
    """What one layer does with new tokens; who has layers says what it needs for that."""

    compilable = True
    geometry: Geometry
    heads: int  # query heads
    epsilon: float
    activation: Callable[[Tensor], Tensor]
    frequencies: Tensor
    rotary_scale: float

    def rotation(self, positions_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, Q, 1, D] of the rotary embedding."""
        half = positions_BQ.unsqueeze(-1).float() * self.frequencies
        angles = torch.cat([half, half], -1).unsqueeze(2)
        dtype = self.geometry.dtype
        return (angles.cos() * self.rotary_scale).to(dtype), (angles.sin() * self.rotary_scale).to(dtype)

    def project(
        self, layer: LeanLayer, x_BQC: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, Q, G·H, D] and keys, and values, both [B, Q, H, D]."""
        B, Q, _ = x_BQC.shape
        kv_heads, width = self.geometry.kv_heads, self.geometry.width
        both = self.heads + kv_heads
        projected = layer.query_key_value(x_BQC).view(B, Q, both + kv_heads, width)
        turned = projected[:, :, :both]
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = turned.split([self.heads, kv_heads], 2)
            turned = torch.cat(
                [self.rms_norm(query, layer.query_norm), self.rms_norm(key, layer.key_norm)], 2
            )
        left, right = turned.chunk(2, -1)
        turned = turned * cos + torch.cat([-right, left], -1) * sin
        return turned[:, :, : self.heads], turned[:, :, self.heads :], projected[:, :, both:]

    def attend(self, query_BQhD: Tensor, cache: SlotCache, number: int, place: SlotIndex) -> Tensor:
        """[B, Q, heads · D] of new tokens over the cache."""
        query = query_BQhD.transpose(1, 2)
        keys, values = cache.keys[number], cache.values[number]
        scaling = self.geometry.width**-0.5
        cache.ask(number, query_BQhD, scaling, place)
        stored = place.mask_B1MS, place.stored_B, place.span
        out = dispatch.verify_attention(query, keys, values, scaling, *stored)
        return out.transpose(1, 2).flatten(2)

    def mlp(self, layer: LeanLayer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self.rms_norm(x, layer.mlp_norm)).chunk(2, -1)
        return layer.down(self.activation(gate) * up)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


class LeanModel(Lean):
    """A model of the Llama family; see `DecodeModel`."""

    def __init__(self, model: PreTrainedModel, prefill_chunk: int) -> None:
        config = model.config
        self.name = model.name_or_path or type(model).__name__
        self.num_tokens, self.prefill_chunk = model.whole_tokens, prefill_chunk
        self.draft_tokens = draft_tokens(model)
        self.feature_layers: tuple[int, ...] = ()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.geometry = Geometry(
            config.num_hidden_layers, kv_heads, heads // kv_heads, width, model.dtype, model.device
        )
        self.heads, self.epsilon = heads, config.rms_norm_eps
        self.embedding = model.get_input_embeddings().weight.detach()
        head = model.get_output_embeddings()
        used = slice(self.num_tokens) if self.draft_tokens is None else self.draft_tokens
        bias = None if head.bias is None else head.bias.detach()[used]
        self.head = Linear(head.weight.detach()[used], bias)
        self.norm = model.model.norm.weight.detach()
        self.activation = model.model.layers[0].mlp.act_fn
        rotary = model.model.rotary_emb
        self.frequencies, self.rotary_scale = rotary.inv_freq.detach(), float(rotary.attention_scaling)
        self.layers = [lean_layer(layer) for layer in model.model.layers]
        of_layers = (
            (layer.query_key_value, layer.output, layer.gate_up, layer.down) for layer in self.layers
        )
        choose_forms([self.head, *chain.from_iterable(of_layers)])

    def hidden(self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache) -> Tensor:
        return self.hidden_and_features(tokens_BQ, step_B, cache)[0]

    def hidden_and_features(
        self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor | None]:
        place = cache.place(step_B, tokens_BQ.shape[1])
        assert cache.turns is not None, "the cache of a lean model holds its rotations"
        cos, sin = (turns[place.rows_B1, place.steps_BQ] for turns in cache.turns)
        features: dict[int, Tensor] = {}
        x_BQC = F.embedding(tokens_BQ, self.embedding)
        for number, layer in enumerate(self.layers):
            if number in self.feature_layers:
                features[number] = x_BQC
            query, key, value = self.project(layer, self.rms_norm(x_BQC, layer.input_norm), cos, sin)
            cache.write(number, key, value, place)
            x_BQC = x_BQC + layer.output(self.attend(query, cache, number, place))
            x_BQC = x_BQC + self.mlp(layer, x_BQC)
        return self.rms_norm(x_BQC, self.norm), side_by_side(features, self.feature_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return among_all(self.head(hidden), self.draft_tokens, self.num_tokens)

    def prefill(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor]:
        return self.read(tokens_BS, cuts, guides)[:2]

    @torch.no_grad()
    def read(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor, Tensor | None]:
        views = [PrefixView(view, start, guide=guides.get(start)) for start, view in cuts]
        behind = [
            self.read_through(span, tokens_BS, [views[number] for number in numbers])
            for span, numbers in readings(cuts).items()
        ]
        return views, *behind[0]

    def read_through(
        self, rolling: Span | None, tokens_BS: Tensor, views: Sequence[PrefixView]
    ) -> tuple[Tensor, Tensor | None]:
        """Fill the views that one pass gives: with full attention, or through a window."""
        B, S = tokens_BS.shape
        H, D = self.geometry.kv_heads, self.geometry.width
        positions_1S = torch.arange(S, device=tokens_BS.device).unsqueeze(0)
        chunks = [slice(at, min(at + self.prefill_chunk, S)) for at in range(0, S, self.prefill_chunk)]
        features: dict[int, Tensor] = {}
        x_BSC = F.embedding(tokens_BS, self.embedding)

        def projected(layer: LeanLayer, span: slice) -> tuple[Tensor, Tensor, Tensor]:
            normed = self.rms_norm(x_BSC[:, span], layer.input_norm)
            parts = self.project(layer, normed, *self.rotation(positions_1S[:, span]))
            return parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)

        for number, layer in enumerate(self.layers):
            if number in self.feature_layers:
                features[number] = x_BSC.clone()
            keys, values = x_BSC.new_empty(2, B, H, S, D)
            for span in chunks:
                _, keys[:, :, span], values[:, :, span] = projected(layer, span)
            for view in views:
                start = view.prefix_tokens
                last = slice(max(0, start - SNAP_WINDOW), start)
                asks = view.view == FULL and layer is self.layers[-1]
                wanted = asks or view.view.policy == "snapkv"
                observed = (projected(layer, last)[0] if wanted else keys[:, :, :0]).unflatten(1, (H, -1))
                view.cut(keys, values, observed, self.frequencies)
                view.asking = (observed, D**-0.5) if asks else None
            # Of the last layer only the last position is needed.
            for span in chunks if layer is not self.layers[-1] else [slice(S - 1, S)]:
                query = projected(layer, span)[0]
                seen = keys[:, :, : span.stop], values[:, :, : span.stop]
                if rolling is not None:
                    out = windowed_attention(query, *seen, D**-0.5, rolling)
                else:
                    attention = causal_attention if span.start == 0 else suffix_attention
                    out = attention(query, *seen, D**-0.5)
                x_BSC[:, span] += layer.output(out.transpose(1, 2).flatten(2))
                x_BSC[:, span] += self.mlp(layer, x_BSC[:, span])
        logits_BV = self.logits(self.rms_norm(x_BSC[:, -1], self.norm))
        return logits_BV, side_by_side(features, self.feature_layers)


def side_by_side(features: dict[int, Tensor], layers: Sequence[int]) -> Tensor | None:
    """Features of some layers as one tensor [B, S, F]; None where no layers are asked for."""
    return torch.cat([features[layer] for layer in layers], -1) if layers else None


def lean_layer(layer: Any) -> LeanLayer:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LeanLayer(
        layer.input_layernorm.weight.detach(),
        fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        None if query_norm is None else query_norm.weight.detach(),
        None if key_norm is None else key_norm.weight.detach(),
        fuse(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        fuse(mlp.gate_proj, mlp.up_proj),
        fuse(mlp.down_proj),
    )
