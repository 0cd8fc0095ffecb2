"""A trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from pipeline.models.draft_vocabulary import write_draft_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that plain `AutoModelForCausalLM.from_pretrained` loads, tokenizer included.

    A draft vocabulary lies beside the weights; whoever does not know it has the whole model.
    """
    model.save_pretrained(folder, safe_serialization=True)
    write_draft_tokens(model, folder)
    tokenizer.save_pretrained(folder)
