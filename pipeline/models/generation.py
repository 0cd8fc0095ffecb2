"""What a model's generation_config says: which tokens end a text, and what else it asks for."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

# Settings of a generation_config that change what is likely, or only what is likely when sampling.
OTHER_LAWS = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "sequence_bias", "exponential_decay_length_penalty", "min_length", "min_new_tokens", "num_beams",
    "penalty_alpha", "guidance_scale",
)  # fmt: skip
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
log = logging.getLogger(__name__)


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end a continuation; ids without a logit cannot be, and are left out with a warning."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = model.config.eos_token_id if eos is None else eos
    ids = frozenset([] if eos is None else eos if isinstance(eos, list) else [eos])
    never = sorted(token for token in ids if not 0 <= token < model.num_tokens)
    if never:
        warn_once(f"{model.name_or_path}: eos_token_id {never} has no logit and ends no text")
    return ids - set(never)


def ends_in(folder: Path) -> set[int]:
    """The ids that end texts, by the files of a model's folder: config.json and generation_config.json."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        eos = stored.get("eos_token_id")
        found |= set([] if eos is None else eos if isinstance(eos, list) else [eos])
    return found


def warn_of_settings(model: PreTrainedModel) -> None:
    """Log a warning of what a target's generation_config asks for and is not done.

    Sampling settings count only where it asks for sampling.
    """
    settings = model.generation_config or GenerationConfig()
    names = [*OTHER_LAWS, *(SAMPLING if settings.do_sample else ())]
    asked = {name: getattr(settings, name, None) for name in names}
    told = [f"{name} {str(value)[:60]}" for name, value in asked.items() if value not in (None, 0, 1, [], {})]
    if told:
        warn_once(
            f"{model.name_or_path}: its generation_config asks for {', '.join(told)}, which is not done: "
            "texts are greedy, or drawn from the model's own probabilities at the config's temperatures"
        )


@functools.cache
def warn_once(text: str) -> None:
    log.warning(text)
