"""Whether a model can be run here, asked of its config and its layers before any weight is read.

Training, replay and decoding need a causal language model of which every layer attends through
transformers' attention interface, over the whole text, with one shape of keys and values, at the positions
that it is told, and whose positions mean the same whatever the text's length. `doctor`, `plan` and every load
of a model ask here.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from pipeline.axes import FULL
from pipeline.kv.view_cache import ATTENTION, read_prefix
from pipeline.models.head import own_logits
from pipeline.models.limits import limits_of, problem_of_length
from pipeline.models.probe import PROBE, Call, probe

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")  # of a config
SPOKEN = 8  # tokens that a loaded model is tried on
NO_INTERFACE = "does not attend through transformers' attention interface, so that no view can be set"


def problem_of(config: PretrainedConfig, reach: int | None, trust_remote_code: bool = False) -> str | None:
    """Why models of this config cannot be run here on texts of up to `reach` tokens; None if they can.

    Args:
        config: as of transformers' `AutoConfig`.
        reach: tokens of the longest text; None where that is not known.

    Returns:
        Words that begin with the kind of model and say what to do.
    """
    kind = config.model_type
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        given = quantised if isinstance(quantised, Mapping) else vars(quantised)
        return (
            f"{kind}: its weights are quantised ({given.get('quant_method', 'in an unknown way')}); name a "
            "checkpoint in float32, bfloat16 or float16, or dequantise this one first"
        )
    if not is_of_text(config):
        return f"{kind} reads more than text; name a checkpoint of its language model alone"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        return f"{kind} is no causal language model"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),  # it would keep what follows
                attn_implementation=PROBE,
                experts_implementation=PROBE,
                trust_remote_code=trust_remote_code,
            ).eval()
    except Exception as error:  # whatever an architecture's own code raises
        if isinstance(error, KeyError) and PROBE in str(error):
            return f"{kind} {NO_INTERFACE}; take a model of another architecture"
        return f"{kind} cannot be built as a causal language model: {short(error)}"
    calls, ended_by = probe(model)
    if problem := problem_of_layers(model, calls, ended_by):
        return f"{problem}; take a model of another architecture"
    return problem_of_length(limits_of(model, calls), kind, reach)


def is_of_text(config: PretrainedConfig) -> bool:
    """Whether it is a language model's alone, not one of several models'."""
    try:
        return config.get_text_config() is config
    except ValueError:  # several of them are language models
        return False


def problem_of_layers(model: PreTrainedModel, calls: list[Call], error: Exception | None) -> str | None:
    """By a pass over two tokens: whether each layer attends once, to products alone, at given positions.

    `error` ended the pass early. Where an architecture asks what values are, as some routers of experts do,
    which there are none of, the layers behind stay unknown.
    """
    kind, unknown = model.config.model_type, error is not None and "meta" in str(error).lower()
    if not calls and error is None:
        return f"{kind} {NO_INTERFACE}"
    if absent := [name for name in NEEDED if not isinstance(getattr(model.config, name, None), int)]:
        return f"{kind}: its config names no {', '.join(absent)}"
    if model.base_model is model:
        return f"{kind}: its layers cannot be told from its head"
    if not all(call.causal for call in calls):
        return f"{kind} attends to tokens that come later"
    if others := sorted({name for call in calls for name in call.others}):
        return f"{kind} attends with {', '.join(others)}, which views of a prefix have not"
    shapes = {call.key for call in calls} | {call.value for call in calls}
    if len(shapes) > 1:
        heads = " and ".join(f"{shape[1]} of {shape[-1]} channels" for shape in sorted(shapes))
        return f"{kind} has heads of several shapes for keys and values ({heads}), and views have one"
    layers = {call.layer for call in calls}
    if len(layers) < len(calls):
        return f"{kind} attends {len(calls)} times in {len(layers)} layers, and views are of one time each"
    if error is not None and not unknown:
        return f"{kind} cannot be run behind views of a prefix: {short(error)}"
    wanted = model.config.num_hidden_layers
    if not unknown and layers != set(range(wanted)):
        return f"{kind}: {len(layers)} of its {wanted} layers attend; no view cuts what the others remember"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{kind} counts positions itself, and behind a view it would count those that are left"
    return None


@torch.no_grad()
def problem_of_loaded(model: PreTrainedModel) -> str | None:
    """Whether a model with its weights says the same behind a full view as by its own attention.

    And whether its logits follow from its final states.
    """
    kind, layers = model.config.model_type, model.config.num_hidden_layers
    tokens_1S = torch.arange(1, SPOKEN + 1, device=model.device).unsqueeze(0)
    try:
        (view,), ours_1V = read_prefix(model, tokens_1S, [(SPOKEN, FULL)])
        states_1C = model.base_model(input_ids=tokens_1S, use_cache=False).last_hidden_state[:, -1]
        made_1V = own_logits(model, states_1C)[..., : model.num_tokens]
        model.set_attn_implementation("eager")
        plain_1V = model(input_ids=tokens_1S, use_cache=False).logits[:, -1, : model.num_tokens]
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of the device, not of the model
    except Exception as error:  # whatever an architecture's own code raises
        return f"{kind} cannot be run behind views of a prefix: {short(error)}"
    finally:
        model.set_attn_implementation(ATTENTION)
    if len(view.layers) != layers:
        return f"{kind}: {len(view.layers)} of its {layers} layers attend"
    if differ(ours_1V, plain_1V):
        return f"{kind} says something else behind a full view than by its own attention"
    if differ(ours_1V, made_1V):
        return f"{kind}: its logits do not follow from the states of its last layer"
    return None


def differ(ours: Tensor, theirs: Tensor) -> bool:
    """Whether more than rounding is between two results. In half precision rounding may send tokens to
    other experts, so that only gross differences tell.

    Not where they are not finite: that is found where they are used, with the place that it is found at.
    """
    difference = float((ours - theirs).float().norm() / theirs.float().norm())
    return math.isfinite(difference) and difference > (1e-3 if ours.dtype == torch.float32 else 0.5)


def short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
