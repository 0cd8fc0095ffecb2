"""Views of a prefix, and the budgeted cache that the same views serve in training, replay and decoding.

`read_prefix` runs one forward over a prefix and keeps, layer by layer, the KV entries that each requested
view selects; a layer's other KV are freed before the next layer runs. `ViewCache` holds the kept entries of
one or many views and the continuation KV behind them, which are appended at their true positions and never
evicted. Keys are kept as rotated, at their original positions unless the view moves them (`positions.py`).

Both are transformers caches. Attention over them is `attend`, registered with transformers as
"budgetdraft"; the cache travels to it as the keyword `view_cache`.

Shape legend: B batch rows, H key/value heads, G query heads per key/value head, S prefix length, N kept
entries, Q new tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from pipeline.axes import FULL, View
from pipeline.kv.attention import (
    BEYOND_A_PRODUCT,
    Span,
    causal_attention,
    suffix_attention,
    suffix_mask,
    windowed_attention,
)
from pipeline.kv.guides import UNGUIDED, Guides, Ranker
from pipeline.kv.policies import SNAP_WINDOW
from pipeline.kv.positions import frequencies_of
from pipeline.kv.views import PrefixView, readings, span_of

ATTENTION = "budgetdraft"
WHOLE = "sees_whole_texts"  # attribute of attention modules whose window no text reaches


class PrefixReader(Cache):
    """Records the requested views while a model reads a prefix: with full attention, and once through each
    window that a view has, in further rows of the same batch."""

    def __init__(
        self,
        cuts: Sequence[tuple[int, View]],
        frequencies: Tensor | None = None,
        offset: int = 0,
        guides: Guides = UNGUIDED,
    ) -> None:
        super().__init__(layers=[])
        self.frequencies, self.offset = frequencies, offset
        self.views = [PrefixView(view, start, guide=guides.get(start)) for start, view in cuts]
        self.readings = readings(cuts)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        outputs, count = [], len(self.readings)
        rows = zip(query.chunk(count), key.chunk(count), value.chunk(count), strict=True)
        for (span, numbers), (queries, keys, values) in zip(self.readings.items(), rows, strict=True):
            queries_BHGSD = queries.unflatten(1, (keys.shape[1], -1))
            for view in (self.views[number] for number in numbers):
                start = view.prefix_tokens
                observed = queries_BHGSD[:, :, :, max(0, start - SNAP_WINDOW) : start]
                view.cut(keys, values, observed, self.frequencies, self.offset)
                if view.view == FULL:
                    view.asking = observed.clone(), scaling  # a slice would hold all queries
            if span is None:
                outputs.append(causal_attention(queries, keys, values, scaling))
            else:
                outputs.append(windowed_attention(queries, keys, values, scaling, span))
        return outputs[0] if count == 1 else torch.cat(outputs)


Masks = dict[tuple[int, int, Span | None], Tensor | None]  # by Q, tokens stored, and window


class ViewLayer(CacheLayerMixin):
    """One layer's buffers: for each group of rows the kept KV, then room for `capacity` more tokens.

    Args:
        spans: the window that each group sees what is stored through; None sees all.
    """

    is_croppable = True

    def __init__(
        self, groups: list[list[tuple[Tensor, Tensor]]], spans: Sequence[Span | None], capacity: int
    ) -> None:
        super().__init__()
        self.capacity, self.appended, self.spans = capacity, 0, spans
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.kept: list[int] = []
        for group in groups:
            kept = group[0][0].shape[2]
            rows = sum(keys.shape[0] for keys, _ in group)
            pair = []
            for parts in zip(*group, strict=True):
                _, H, _, D = parts[0].shape
                buffer = parts[0].new_empty(rows, H, kept + capacity, D)
                torch.cat(parts, out=buffer[:, :, :kept]) if len(parts) > 1 else buffer[:, :, :kept].copy_(
                    parts[0]
                )
                pair.append(buffer)
            self.buffers.append((pair[0], pair[1]))
            self.kept.append(kept)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a view layer is built from a prefix and is always initialized")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the KV of Q new tokens for all rows."""
        new, row = key_states.shape[2], 0
        if self.appended + new > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} continuation tokens, not {self.appended + new}"
            )
        for (keys, values), kept in zip(self.buffers, self.kept, strict=True):
            rows, at = (
                slice(row, row + keys.shape[0]),
                slice(kept + self.appended, kept + self.appended + new),
            )
            keys[:, :, at] = key_states[rows]
            values[:, :, at] = value_states[rows]
            row += keys.shape[0]
        self.appended += new
        if len(self.buffers) > 1:
            return key_states, value_states
        used = self.kept[0] + self.appended
        return self.buffers[0][0][:, :, :used], self.buffers[0][1][:, :, :used]

    def attend(self, query: Tensor, scaling: float, masks: Masks) -> Tensor:
        """Attention of the last Q appended tokens over their kept KV and, causally, the continuation.

        Args:
            masks: those that other layers have made.
        """
        outputs, row = [], 0
        for (keys, values), kept, span in zip(self.buffers, self.kept, self.spans, strict=True):
            used = kept + self.appended
            rows = slice(row, row + keys.shape[0])
            seen = keys[:, :, :used], values[:, :, :used]
            if (place := (query.shape[2], used, span)) not in masks:
                masks[place] = suffix_mask(query, seen[0], span)
            outputs.append(suffix_attention(query[rows], *seen, scaling, masks[place]))
            row += keys.shape[0]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def get_seq_length(self) -> int:
        return self.kept[0] + self.appended

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.kept[0] + self.capacity


class ViewCache(Cache):
    """Kept prefix KV of one or several views, and room for `capacity` continuation tokens behind each.

    Rows are the views' rows in order. Neighbouring views with equally many kept entries, and one window if
    they roll, share one attention call, so put views of the same budget side by side.
    """

    layers: list[ViewLayer]

    def __init__(self, views: Sequence[PrefixView], capacity: int) -> None:
        groups: list[list[PrefixView]] = []
        for view in views:
            if groups and alike(groups[-1][0], view):
                groups[-1].append(view)
            else:
                groups.append([view])
        num_layers = len(views[0].layers)
        spans = [span_of(group[0].view) for group in groups]
        layers: list[Any] = [
            ViewLayer([[view.layers[layer] for view in group] for group in groups], spans, capacity)
            for layer in range(num_layers)
        ]
        super().__init__(layers=layers)
        self.masks: Masks = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return self.layers[layer].attend(query, scaling, self.masks)

    def exchange(self, view: PrefixView, appended: int) -> None:
        """Of a cache of one view: go back to so many continuation tokens, behind other entries, as many."""
        for layer, pair in zip(self.layers, view.layers, strict=True):
            for buffer, part in zip(layer.buffers[0], pair, strict=True):
                buffer[:, :, : view.kept] = part
            layer.appended = appended


def alike(one: PrefixView, other: PrefixView) -> bool:
    """Whether attention over two views is masked alike."""
    return one.kept == other.kept and span_of(one.view) == span_of(other.view)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    view_cache: PrefixReader | ViewCache | Ranker | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: over a view cache, or causal where there is none."""
    windowed = sliding_window is not None and not getattr(module, WHOLE, False)
    others = [words for name, words in BEYOND_A_PRODUCT.items() if kwargs.get(name) is not None]
    if windowed or others or attention_mask is not None:
        others += ["a sliding window"] * windowed + ["a padding mask"] * (attention_mask is not None)
        raise ValueError(f"attention with {', '.join(others)} is not supported")
    if view_cache is None:
        # With a cache of transformers, as under `generate`, there are more keys than queries.
        attention = causal_attention if query.shape[2] == key.shape[2] else suffix_attention
        output = attention(query, key, value, scaling)
    else:
        output = view_cache.attend(module.layer_idx, query, key, value, scaling)  # type: ignore[arg-type]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)


@torch.no_grad()
def read_prefix(
    model: PreTrainedModel,
    tokens_BS: Tensor,
    cuts: Sequence[tuple[int, View]],
    offset: int = 0,
    guides: Guides = UNGUIDED,
) -> tuple[list[PrefixView], Tensor]:
    """One forward over prefixes of equal length: with full attention, and through each window of the views.

    Args:
        model: a causal language model loaded with `models.load.load_model`.
        tokens_BS: [B, S] tokens from position 0.
        cuts: (prefix length <= S, view) pairs; each gives one `PrefixView` of that many first tokens.
        offset: positions by which the sinks of every view are moved back.
        guides: the target's, of the prefixes that a view `target_guided` is of.

    Returns:
        The views in the order of `cuts`, and the logits [B, V] after the last token; of full attention,
        unless all views are windows shorter than their prefix.
    """
    reader = PrefixReader(cuts, frequencies_of(getattr(model, "module", model)), offset, guides)
    output = model(
        input_ids=tokens_BS.repeat(len(reader.readings), 1),
        past_key_values=reader,
        view_cache=reader,
        use_cache=True,
        position_ids=torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0),
        logits_to_keep=1,
    )
    if any(not view.layers for view in reader.views):
        raise ValueError(
            f"{type(model).__name__} does not pass `view_cache` to its attention function: "
            "this architecture is not supported"
        )
    return reader.views, output.logits[: len(tokens_BS), -1, : model.num_tokens]


def check_attention(model: PreTrainedModel) -> None:
    """Raises ValueError for a model whose attention would see other entries than a view's."""
    own = getattr(model, "module", model).config._attn_implementation
    if own != ATTENTION:
        raise ValueError(f"the model attends by {own!r}, which knows no views: load it with models.load")


def read_continuation(
    model: PreTrainedModel, cache: ViewCache, tokens_RQ: Tensor, positions_RQ: Tensor
) -> Tensor:
    """Logits [R, Q, V] of Q more tokens per row, whose KV are appended to the cache.

    Args:
        positions_RQ: true positions of the tokens, [R, Q] or [1, Q].

    Raises:
        ValueError: if the model was not loaded with `models.load.load_model`.
    """
    check_attention(model)
    output = model(
        input_ids=tokens_RQ,
        position_ids=positions_RQ,
        past_key_values=cache,
        view_cache=cache,
        use_cache=True,
    )
    return output.logits[..., : model.num_tokens]


def read_hidden(model: PreTrainedModel, cache: ViewCache, tokens_RQ: Tensor, positions_RQ: Tensor) -> Tensor:
    """The final hidden states [R, Q, C] from which `read_continuation` makes its logits."""
    check_attention(model)
    output = model.base_model(
        input_ids=tokens_RQ,
        position_ids=positions_RQ,
        past_key_values=cache,
        view_cache=cache,
        use_cache=True,
    )
    return output.last_hidden_state
