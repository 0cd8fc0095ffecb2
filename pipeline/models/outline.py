"""The models of a config without their weights: built on the meta device, from their configs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.models.build import build_random, prepare_model
from pipeline.models.heads.begin import head_config
from pipeline.models.heads.eagle import FeatureHead
from pipeline.models.hub import config_here
from pipeline.models.layers import freeze_around_layers, keep_layers
from pipeline.models.load import model_ref, read_config

if TYPE_CHECKING:
    from pipeline.config.models import Role
    from pipeline.config.schema import Config


def outline(config: Config, role: Role, vocab: int) -> PreTrainedModel:
    """A model as it is trained: its layers, its config, and which of its weights are frozen.

    Args:
        vocab: entries of the tokenizer, which a scratch model has as well.

    Raises:
        BadData: if a pretrained model's config.json is not on this machine, or cannot be read.
    """
    spec = config.models[role]
    base = config.target if role == "target" else config.drafter_base
    with torch.device("meta"):
        if base.kind == "scratch":
            model = build_random(base, vocab)
        else:
            of: Role = role if spec is base else "target"
            given = read_config(model_ref(base, None, of), config_here(base, of))
            model = AutoModelForCausalLM.from_config(given, trust_remote_code=base.trust_remote_code)
        if spec.kind == "first_layers":
            return freeze_around_layers(keep_layers(model, spec.layers))
        if spec.kind == "head":
            whole = model.config.get_text_config(decoder=True).vocab_size
            proposable = config.train.draft_vocabulary or whole
            target = prepare_model(model, vocab)
            return FeatureHead(head_config(target, proposable, spec.feature_layers, **spec.options))
    return model
