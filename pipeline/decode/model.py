"""A model as decoding runs it: functions over its weights, without modules, over static caches.

`LeanModel` covers the Llama family. `ModuleModel` runs any other architecture through its transformers
modules.

Shape legend: B rows, S prefix length, Q new tokens, C hidden width, F width of the features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kernels import dispatch
from pipeline.axes import FULL, View
from pipeline.decode.lean import LeanModel, side_by_side
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.kv.positions import frequencies_of
from pipeline.kv.slot_cache import Geometry, Rotation, SlotCache, SlotIndex
from pipeline.kv.view_cache import read_prefix
from pipeline.kv.views import PrefixView
from pipeline.models.draft_vocabulary import among_all, draft_tokens
from pipeline.models.head import own_logits
from pipeline.models.layers import FAMILY

# Their rotation is a function of the position alone; others depend on how long the text has become.
FIXED_ROTATIONS = ("default", "linear", "yarn", "llama3")


class DecodeModel(Protocol):
    """What decoding asks of a model."""

    name: str
    compilable: bool
    num_tokens: int
    geometry: Geometry
    feature_layers: tuple[int, ...]  # 0-based; whose inputs a head over this model reads

    @property
    def rotation(self) -> Rotation | None:
        """Cosines and sines of positions, for the cache to hold; None where the model has its own way."""
        ...

    @property
    def frequencies(self) -> Tensor | None:
        """[D/2] radians a position by which keys are turned; None where there is no one way."""
        ...

    def hidden(self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache) -> Tensor:
        """Final hidden states [B, Q, C] of Q tokens, whose KV go into the cache at `step_B` and on."""
        ...

    def hidden_and_features(
        self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor | None]:
        """As `hidden`, and the inputs [B, Q, F] of `feature_layers`; None where there are none."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, C] → […, V]."""
        ...

    def prefill(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor]:
        """As `view_cache.read_prefix`."""
        ...

    def read(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor, Tensor | None]:
        """As `prefill`, and the inputs [B, S, F] of `feature_layers`; None where there are none."""
        ...


def decode_model(model: PreTrainedModel, prefill_chunk: int = 2048) -> DecodeModel:
    """The fastest form of a model that was loaded with `models.load.load_model`."""
    config = model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    default = ["full_attention"] if getattr(config, "sliding_window", None) is None else ["sliding"]
    whole = set(getattr(config, "layer_types", None) or default) == {"full_attention"}
    # Code that comes with a model may call itself one of the family and do something else.
    native = type(model).__module__.startswith("transformers.")
    if native and config.model_type in FAMILY and rotation in FIXED_ROTATIONS and whole:
        return LeanModel(model, prefill_chunk)
    return ModuleModel(model)


class ModuleModel:
    """Any other architecture with transformers' attention interface; neither compiled nor chunked."""

    compilable = False
    rotation: Rotation | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name = model.name_or_path or type(model).__name__
        self.num_tokens = model.whole_tokens
        self.feature_layers: tuple[int, ...] = ()
        self.frequencies = frequencies_of(model)
        # One token tells what the model's KV look like.
        (view,), _ = read_prefix(model, torch.zeros(1, 1, dtype=torch.long, device=model.device), [(1, FULL)])
        keys = view.layers[0][0]
        heads = model.config.num_attention_heads
        self.geometry = Geometry(
            len(view.layers), keys.shape[1], heads // keys.shape[1], keys.shape[3], keys.dtype, keys.device
        )

    def hidden(self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache) -> Tensor:
        return self.hidden_and_features(tokens_BQ, step_B, cache)[0]

    def hidden_and_features(
        self, tokens_BQ: Tensor, step_B: Tensor, cache: SlotCache
    ) -> tuple[Tensor, Tensor | None]:
        place = cache.place(step_B, tokens_BQ.shape[1])
        with kept_inputs(self.model, self.feature_layers) as features:
            hidden = self.model.base_model(
                input_ids=tokens_BQ,
                position_ids=place.steps_BQ + cache.prefix_B.unsqueeze(1),
                view_cache=SlotWriter(cache, place),
                use_cache=False,
            ).last_hidden_state
        return hidden, side_by_side(features, self.feature_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.among_all(own_logits(self.model, hidden)[..., : self.model.num_tokens])

    def prefill(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor]:
        return self.read(tokens_BS, cuts, guides)[:2]

    def read(
        self, tokens_BS: Tensor, cuts: Sequence[tuple[int, View]], guides: Guides = UNGUIDED
    ) -> tuple[list[PrefixView], Tensor, Tensor | None]:
        with kept_inputs(self.model, self.feature_layers) as features:
            views, logits_BV = read_prefix(self.model, tokens_BS, cuts, guides=guides)
        return views, self.among_all(logits_BV), side_by_side(features, self.feature_layers)

    def among_all(self, logits: Tensor) -> Tensor:
        return among_all(logits, draft_tokens(self.model), self.num_tokens)


class SlotWriter(NamedTuple):
    """What `view_cache.attend` is handed as `view_cache` in one forward pass over a static cache."""

    cache: SlotCache
    place: SlotIndex

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        self.cache.write(layer, key.transpose(1, 2), value.transpose(1, 2), self.place)
        self.cache.ask(layer, query.transpose(1, 2), scaling, self.place)
        return dispatch.verify_attention(
            query,
            self.cache.keys[layer],
            self.cache.values[layer],
            scaling,
            self.place.mask_B1MS,
            self.place.stored_B,
            self.place.span,
        )


@contextmanager
def kept_inputs(model: PreTrainedModel, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What some of a model's layers read while this is open, by layer."""
    features: dict[int, Tensor] = {}

    def keep(number: int, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        features[number] = args[0] if args else kwargs["hidden_states"]

    layers: Any = model.base_model.layers if wanted else ()
    hooks = [
        layers[number].register_forward_pre_hook(partial(keep, number), with_kwargs=True) for number in wanted
    ]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()
