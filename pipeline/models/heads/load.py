"""Heads from their folders, for the target that they were trained over."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.errors import BadData
from pipeline.models.build import prepare_model
from pipeline.models.draft_vocabulary import read_draft_tokens
from pipeline.models.heads.eagle import MODEL_TYPE, FeatureHead
from pipeline.models.hub import model_folder
from pipeline.models.load import ModelRef
from pipeline.models.support import short
from pipeline.models.weights import must_be_whole


def is_head(folder: Path) -> bool:
    try:
        given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(given, dict) and given.get("model_type") == MODEL_TYPE


def load_head(
    ref: ModelRef, target: PreTrainedModel, device: torch.device | str = "cpu", dtype: str | None = None
) -> FeatureHead:
    """A head in evaluation mode, which reads tokens by the target's embedding.

    Raises:
        BadData: if it cannot be read whole, or is of another target; names its path.
    """
    folder = model_folder(ref)
    try:
        head, told = FeatureHead.from_pretrained(
            folder, dtype=getattr(torch, dtype or ref.dtype), use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever a loader raises for what is in the files
        raise BadData(f"cannot load the head {ref.path!r}: {short(error)}") from error
    must_be_whole(head, told["missing_keys"], f"the head {ref.path!r}")
    given = target.config.get_text_config(decoder=True)
    ours, theirs = (
        (head.config.target_hidden_size, head.config.vocab_size),
        (given.hidden_size, target.whole_tokens),
    )
    if ours != theirs or max(head.config.feature_layers) >= given.num_hidden_layers:
        raise BadData(
            f"the head {ref.path!r} is over hidden states of width {ours[0]} of layers "
            f"{head.config.feature_layers} and {ours[1]} tokens, and the target has width {theirs[0]}, "
            f"{given.num_hidden_layers} layers and {theirs[1]} tokens: it is of another target"
        )
    tokens_V = read_draft_tokens(folder)
    if tokens_V is None or len(tokens_V) != head.config.draft_vocab_size:
        raise BadData(f"the head {ref.path!r} has no draft vocabulary of its size: copy the folder again")
    head = prepare_model(head.to(device), target.whole_tokens)
    head.lm_head.tokens = tokens_V.to(device)
    head.num_tokens = len(tokens_V)
    return head.attach(target.get_input_embeddings().weight)
