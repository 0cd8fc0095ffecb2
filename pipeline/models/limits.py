"""Up to which length a model reads texts as it should: sliding windows, rotations and tables of positions.

Within such a length a window sees the whole text and a position means the same in every text, so that the
model can be run as if it had no limit. Beyond it, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.kv.view_cache import ATTENTION
from pipeline.models.probe import PROBE, Call, probe

if TYPE_CHECKING:
    from pipeline.config.schema import Config

LEARNED = re.compile(r"pos|wpe")  # names of tables of positions
# Fields that say how far a layer of a type sees.
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


class Limit(NamedTuple):
    """The most tokens of a text, why no more, and what to do about it.

    A longer text is read `otherwise`, without an error, or else cannot be read at all.
    """

    tokens: int
    reason: str
    remedy: str
    otherwise: bool = True


def longest_text(config: Config) -> int:
    """Positions that a config asks of both models. Drafting looks up to γ beyond the end of a text."""
    data = config.data
    texts = max(data.context_tokens.values()) + data.max_new_tokens + max(config.sweep.gammas)
    served = data.sequence_tokens + (config.improve.gamma if config.improve else 0)
    return max(served, texts)


def problem_of_length(limits: list[Limit], kind: str, reach: int | None) -> str | None:
    """Why a kind of model cannot be run on texts of `reach` tokens, or of unknown length (None)."""
    for limit in limits:
        if reach is None and limit.otherwise:
            return (
                f"{kind} {limit.reason}, and how long texts get is not said: name that length (`max_tokens` "
                "of load_pair, `reach` of a ModelRef)"
            )
        if reach is not None and limit.tokens < reach:
            return f"{kind} {limit.reason}, and texts get {reach:,} tokens long: {limit.remedy}"
    return None


def limits_of(model: PreTrainedModel, calls: list[Call]) -> list[Limit]:
    """Empty where a text's length does not matter.

    Args:
        calls: of the model's layers, as `probe` gives them.
    """
    return [*limits_of_windows(model.config, calls), *limits_of_positions(model)]


def limits_of_loaded(model: PreTrainedModel) -> list[Limit]:
    """The limits of a model that was loaded with `models.load.load_model`."""
    model.set_attn_implementation(PROBE)
    try:
        calls, _ = probe(model)
    finally:
        model.set_attn_implementation(ATTENTION)
    return limits_of(model, calls)


def limits_of_windows(config: PretrainedConfig, calls: list[Call]) -> Iterator[Limit]:
    kinds = getattr(config, "layer_types", None) or ()
    windows = [call.window for call in calls if call.window]
    windows += [getattr(config, field) for kind, field in WINDOWS.items() if kind in kinds]
    if windows:
        yield Limit(
            min(windows),
            f"attends within a sliding window of {min(windows):,} tokens",
            "lower data.contexts and data.sequence_tokens, or take a model whose layers see the whole text",
        )


def limits_of_positions(model: PreTrainedModel) -> Iterator[Limit]:
    """Of rotations that depend on a text's length, and of tables of positions."""
    fixed, learned = fixed_rotation(model.config), learned_positions(model)
    if fixed is not None:
        types = " and ".join(sorted({str(rotation["rope_type"]) for rotation in rotations(model.config)}))
        yield Limit(
            fixed,
            f"with rope_type {types} turns all positions otherwise where a text has over {fixed:,} tokens",
            "lower data.contexts and data.sequence_tokens, or set a rope_scaling that does not depend on the "
            "text, such as yarn",
        )
    if learned is not None:
        yield Limit(
            learned,
            f"has {learned:,} learned positions and no more",
            "lower data.sequence_tokens and data.contexts, or take another model",
            otherwise=False,
        )


def rotations(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Sets of rope parameters: one of all layers, or one for each type of layer."""
    given: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    groups = (given, *given.values())
    return [group for group in groups if isinstance(group, Mapping) and "rope_type" in group]


def fixed_rotation(config: PretrainedConfig) -> int | None:
    """Tokens up to which a rotation that depends on a text's length stays as it is; None for all others."""
    lengths = [
        min(int(rotation.get("original_max_position_embeddings") or positions), positions)
        for rotation in rotations(config)
        for positions in [config.max_position_embeddings]
        if "dynamic" in rotation["rope_type"] or rotation["rope_type"] == "longrope"
    ]
    return min(lengths, default=None)


def learned_positions(model: PreTrainedModel) -> int | None:
    """Positions of a model that looks them up in a table; None where they are computed."""
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and module is not tokens and LEARNED.search(name):
            return int(getattr(model.config, "max_position_embeddings", module.num_embeddings))
    return None
