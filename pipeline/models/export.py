"""A trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that plain `AutoModelForCausalLM.from_pretrained` loads, tokenizer included."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
