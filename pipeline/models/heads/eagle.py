"""Drafters of kind `head`: one layer over the target's hidden states, in the form of EAGLE-3 and 3.1.

Slot i of a text reads the token *behind* position i beside the target's features of position i, sits at
position i, and gives the token after that:

    g_i = fc · [f_i^a; f_i^b; f_i^c]         features: inputs of three of the target's layers, 3H → H
    u_i = [norm e(x_{i+1}); norm g_i]        2H, from which come query, key and value
    z_i = residual + attention, then + MLP(norm z_i)
    logits = head · norm z_i                 of x_{i+2}, over the draft vocabulary

While it drafts, a head's own output stands in for the features of the next slot: z_i, or norm z_i. A chain of
depth s from token t so reads tokens t .. t+s-1, the first with true features; it sees the prefix, the true
slots up to t's, and its own slots behind them. `forward` runs the chains of all tokens of a window at once,
for training and for replay. The keys and values of a prefix need no attention: three products a position.

Parameters have the names of the engines' checkpoints. The embedding is the target's, and is not stored.

Shape legend: B rows, S tokens, C tokens of a window, H width, F = 3H, N kept entries, K key/value heads, G
query heads per key/value head, D head width, T depth of chains, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from pipeline.axes import View
from pipeline.kv.attention import Span
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.policies import SNAP_WINDOW
from pipeline.kv.views import PrefixView, span_of
from pipeline.models.draft_vocabulary import DraftRows

MODEL_TYPE = "budgetdraft_head"


class HeadConfig(LlamaConfig):
    """The shape of a head; `vocab_size` is the target's, and other fields are those of a Llama's one layer.

    Args:
        feature_layers: the target's layers, 0-based, whose inputs are the features.
        target_hidden_size: width of each of the three.
        norm_before_residual: the residual is norm g, not g.
        fc_norm: each third of the features is normed first (3.1).
        norm_output: what is fed back is norm z, not z (3.1).
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        feature_layers: Sequence[int] = (),
        target_hidden_size: int = 0,
        draft_vocab_size: int = 1,
        norm_before_residual: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        **kwargs: Any,
    ) -> None:
        self.feature_layers, self.target_hidden_size = list(feature_layers), target_hidden_size
        self.draft_vocab_size = draft_vocab_size
        self.norm_before_residual, self.fc_norm, self.norm_output = norm_before_residual, fc_norm, norm_output
        super().__init__(**{"num_hidden_layers": 1, "tie_word_embeddings": False, **kwargs})


AutoConfig.register(MODEL_TYPE, HeadConfig)


class HeadAttention(nn.Module):
    """The projections of the layer: from two widths to queries, keys and values, and back to one."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        H, query = config.hidden_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * H, query, bias=False)
        self.k_proj = nn.Linear(2 * H, kv, bias=False)
        self.v_proj = nn.Linear(2 * H, kv, bias=False)
        self.o_proj = nn.Linear(query, H, bias=False)


class HeadLayer(nn.Module):
    """What the one layer has."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn, self.mlp = HeadAttention(config), LlamaMLP(config)


class FeatureHead(PreTrainedModel):
    """A head; call `attach` with the target's embedding before anything else."""

    config_class = HeadConfig
    num_tokens: int
    whole_tokens: int

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        thirds = len(config.feature_layers)
        self.fc = nn.Linear(thirds * config.target_hidden_size, config.hidden_size, bias=False)
        norms = thirds if config.fc_norm else 0
        self.fc_norm = nn.ModuleList(
            LlamaRMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in range(norms)
        )
        self.midlayer = HeadLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = DraftRows(config.hidden_size, config.draft_vocab_size)
        self.rotary = LlamaRotaryEmbedding(config)
        self.register_buffer("embedding", torch.empty(0), persistent=False)
        self.embedding: Tensor
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        raise AssertionError("a head's draft vocabulary is chosen when it is built")

    def attach(self, embedding_VH: Tensor) -> FeatureHead:
        """Let it read tokens by the target's embedding, whose memory is shared."""
        self.embedding = embedding_VH.detach()
        return self

    def fuse(self, features_BSF: Tensor) -> Tensor:
        """g of features, [B, S, H]."""
        if self.config.fc_norm:
            thirds = features_BSF.chunk(len(self.fc_norm), -1)
            normed = [norm(third) for norm, third in zip(self.fc_norm, thirds, strict=True)]
            features_BSF = torch.cat(normed, -1)
        g_BSH: Tensor = self.fc(features_BSF)
        return g_BSH

    def project(
        self, tokens_BS: Tensor, g_BSH: Tensor, positions_BS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of slots that read these tokens: rotated queries [B, K·G, S, D] and keys, values, the residual."""
        layer, width = self.midlayer, self.config.head_dim
        normed = layer.hidden_norm(g_BSH)
        read = torch.nn.functional.embedding(tokens_BS, self.embedding).to(normed.dtype)
        both = torch.cat([layer.input_layernorm(read), normed], -1)
        query, key, value = (
            projection(both).unflatten(-1, (-1, width)).transpose(1, 2)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        cos, sin = self.rotary(both, positions_BS)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query, key, value, normed if self.config.norm_before_residual else g_BSH

    def finish(self, attended_BhSD: Tensor, residual_BSH: Tensor) -> Tensor:
        """z [B, S, H] of what the queries have seen."""
        layer = self.midlayer
        z = residual_BSH + layer.self_attn.o_proj(attended_BhSD.transpose(1, 2).flatten(2))
        z_BSH: Tensor = z + layer.mlp(layer.post_attention_layernorm(z))
        return z_BSH

    def prefix(
        self,
        tokens_BS: Tensor,
        features_BSF: Tensor,
        cuts: Sequence[tuple[int, View]],
        guides: Guides = UNGUIDED,
    ) -> list[PrefixView]:
        """What views keep of prefixes: of S tokens, S - 1 slots, as the last waits for the token behind it.

        Args:
            cuts: (prefix length <= S, view) pairs, as of `view_cache.read_prefix`.
            guides: likewise.
        """
        slots = torch.arange(tokens_BS.shape[1] - 1, device=tokens_BS.device).unsqueeze(0)
        g = self.fuse(features_BSF[:, :-1])
        query, key, value, _ = self.project(tokens_BS[:, 1:], g, slots)
        read = query, key, value
        return [self.cut(PrefixView(v, n - 1, guide=guides.get(n)), *read) for n, v in cuts]

    def cut(self, cut: PrefixView, query: Tensor, key: Tensor, value: Tensor, offset: int = 0) -> PrefixView:
        """A view, filled from the slots of a text."""
        slots = cut.prefix_tokens
        observed = query[:, :, max(0, slots - SNAP_WINDOW) : slots].unflatten(1, (key.shape[1], -1))
        cut.cut(key, value, observed, self.rotary.inv_freq, offset)
        return cut

    def forward(
        self,
        tokens_BS: Tensor,
        features_BSF: Tensor,
        starts: Sequence[int],
        length: int,
        views: Sequence[View],
        depth: int,
        logits: bool = False,
        offset: int = 0,
        choose: Callable[[Tensor], Tensor] | None = None,
        guides: Guides = UNGUIDED,
    ) -> list[Tensor]:
        """Normed outputs of the chains of all tokens of windows, behind each view of what comes before.

        A window with start s has tokens s .. s+C-1; its prefix are the tokens before. Prefixes are projected
        once, and views are cut from them with their gradients; which entries are kept has none. The sinks of
        every view are moved back by `offset` positions. `guides` are those of the prefixes.

        Returns:
            For each depth up to `depth`, [len(views) · len(starts) · B, C, H] (views outermost, then
            windows): at token t of its window, what gives the token at s + t + 1 + depth. Where a chain would
            read beyond the window it reads the window's last token, and means nothing. With `logits` they are
            multiplied by the head, [..., C, V]. With `choose` chains read what it makes of the logits
            [..., C, V] of one depth, tokens [..., C], at the next one, and not the window's tokens.
        """
        read = max(starts) + length
        slots = torch.arange(read - 1, device=tokens_BS.device).unsqueeze(0)
        g = self.fuse(features_BSF[:, : read - 1])
        query, key, value, residual = self.project(tokens_BS[:, 1:read], g, slots)
        kept = [
            self.cut(PrefixView(view, start - 1, guide=guides.get(start)), query, key, value, offset)
            for view in views
            for start in starts
        ]
        rows = [slice(start - 1, start - 1 + length) for start in starts] * len(views)
        outputs = self.chains(
            kept,
            torch.cat([tokens_BS[:, start : start + length] for start in starts] * len(views)),
            torch.cat([query[:, :, row] for row in rows]),
            torch.cat([key[:, :, row] for row in rows]),
            torch.cat([value[:, :, row] for row in rows]),
            torch.cat([residual[:, row] for row in rows]),
            depth,
            choose,
        )
        return [self.lm_head(output) for output in outputs] if logits else outputs

    def chains(
        self,
        kept: Sequence[PrefixView],
        tokens_RC: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        residual_RCH: Tensor,
        depth: int,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Chains from C slots, which are as `project` gives them; each view is of an equal part of R rows.

        Args:
            choose: as of `forward`.
        """
        C = tokens_RC.shape[1]
        rows = tokens_RC.shape[0] // len(kept)
        first_R1 = torch.cat(
            [torch.full((rows, 1), view.prefix_tokens, device=tokens_RC.device) for view in kept]
        )
        steps = torch.arange(C, device=tokens_RC.device)
        true, own = (key, value), list[tuple[Tensor, Tensor]]()
        z = self.finish(chain_attention(query, kept, true, own), residual_RCH)
        normed = [self.norm(z)]
        for at in range(1, depth):
            if choose is None:
                read_RC = tokens_RC[:, (steps + at).clamp_max(C - 1)]
            else:
                read_RC = choose(self.lm_head(normed[-1]))
            fed = normed[-1] if self.config.norm_output else z
            query, *pair, residual_RCH = self.project(read_RC, fed, first_R1 + steps + at)
            own.append((pair[0], pair[1]))
            z = self.finish(chain_attention(query, kept, true, own), residual_RCH)
            normed.append(self.norm(z))
        return normed


def rolled_out(span: Span, kept: int, count: int, depth: int, device: torch.device) -> list[Tensor]:
    """What has left a window at a depth: of the prefix [C, N], true slots [C, C], own slots [C, 1] each.

    Slots are numbered from the first kept entry; the chain from token t asks from slot N + t + depth.
    """
    asking_C1 = kept + depth + torch.arange(count, device=device).unsqueeze(1)
    slots = torch.arange(kept + count, device=device)
    hidden = (slots >= span.sinks) & (slots <= asking_C1 - span.recent)
    first_C1 = kept + torch.arange(count, device=device).unsqueeze(1)
    own = [
        (first_C1 + at >= span.sinks) & (first_C1 + at <= asking_C1 - span.recent)
        for at in range(1, depth + 1)
    ]
    return [hidden[:, :kept], hidden[:, kept:], *own]


def chain_attention(
    query: Tensor,
    kept: Sequence[PrefixView],
    true: tuple[Tensor, Tensor],
    own: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Attention [R, K·G, C, D] of one slot of each chain over its prefix, true slots and own slots.

    Args:
        query: [R, K·G, C, D], of the chains that begin at each of C slots.
        kept: of the prefixes, one for R ÷ len(kept) rows each.
        true: keys and values of the slots with true features, [R, K, C, D]: a chain sees them up to its own.
        own: the same of the slots that the chains have added, of which each sees its own.
    """
    R, _, C, D = query.shape
    K, rows = true[0].shape[1], R // len(kept)
    query_RKGCD = query.unflatten(1, (K, -1)) * D**-0.5
    future_CC = torch.ones(C, C, dtype=torch.bool, device=query.device).triu(1)
    outputs = []
    for number, view in enumerate(kept):
        part = slice(number * rows, (number + 1) * rows)
        ((keys, values),) = view.layers
        q = query_RKGCD[part]
        seen = [keys.unsqueeze(2), true[0][part].unsqueeze(2)]
        scores = [q @ keys.transpose(-1, -2) for keys in seen]
        scores[1] = scores[1].masked_fill(future_CC, -torch.inf)
        scores += [(q * keys[part].unsqueeze(2)).sum(-1, keepdim=True) for keys, _ in own]
        if (span := span_of(view.view)) is not None:
            for at, hidden in enumerate(rolled_out(span, keys.shape[2], C, len(own), query.device)):
                scores[at] = scores[at].masked_fill(hidden, -torch.inf)
        sizes = [score.shape[-1] for score in scores]
        exact = torch.promote_types(q.dtype, torch.float32)
        weights = torch.cat(scores, -1).softmax(-1, dtype=exact).to(q.dtype).split(sizes, -1)
        out = weights[0] @ values.unsqueeze(2) + weights[1] @ true[1][part].unsqueeze(2)
        for weight, (_, value) in zip(weights[2:], own, strict=True):
            out = out + weight * value[part].unsqueeze(2)
        outputs.append(out.flatten(1, 2))
    return torch.cat(outputs)
