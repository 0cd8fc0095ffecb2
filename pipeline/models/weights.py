"""The files of a checkpoint: whether they are there, whole, and of the model that the config describes.

Told by the headers of the files, so that it takes no longer for a large model than for a small one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.errors import BadData
from pipeline.models.support import short

if TYPE_CHECKING:
    from pipeline.models.load import ModelRef

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Shape = tuple[int, ...]


def weight_files(ref: ModelRef, folder: Path) -> list[Path]:
    """The safetensors of a model's folder: one, or the shards that an index names.

    Raises:
        BadData: if there are none, or not all that the index names.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        local = os.path.isdir(ref.path)
        download = "" if local else f"run `hf download {ref.path} --local-dir FOLDER`, then "
        raise BadData(
            f"the {ref.role} {ref.path} holds no {WEIGHTS}; {download}convert a .bin checkpoint once with "
            f"`budgetdraft convert {ref.path if local else 'FOLDER'} OUTPUT` and name OUTPUT in the config"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadData(f"the {ref.role} {ref.path}: its {INDEX} cannot be read: {short(error)}") from error
    if absent := [file.name for file in files if not file.exists()]:
        raise BadData(
            f"the {ref.role} {ref.path} lacks {', '.join(absent[:4])}, which its {INDEX} names: fetch "
            "what is missing"
        )
    return files


def check_weights(ref: ModelRef, folder: Path, config: PretrainedConfig) -> None:
    """Raise BadData unless a model's folder holds weights as safetensors, whole and of the config's sizes."""
    found: dict[str, Shape] = {}
    for file in weight_files(ref, folder):
        found |= header(ref, file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=ref.trust_remote_code)
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    prefix = f"{model.base_model_prefix}."  # which a checkpoint of the layers alone has not
    found = {name if name in wanted else prefix + name: shape for name, shape in found.items()}
    # Sizes in any order, for some weights are turned when they are read.
    other = [name for name in wanted if name in found and sorted(found[name]) != sorted(wanted[name])]
    if other:
        name = other[0]
        raise BadData(
            f"the {ref.role} {ref.path}: {len(other)} weights do not fit its config.json, such as {name}, "
            f"which is {list(found[name])} and should be {list(wanted[name])}: one of the two files is "
            "another model's"
        )
    # Some architectures bring older names to those of today: what is missing then shows when it is loaded.
    if found.keys() <= wanted.keys():
        must_be_whole(model, wanted.keys() - found.keys(), f"the {ref.role} {ref.path!r}")


def header(ref: ModelRef, file: Path) -> dict[str, Shape]:
    """Names and sizes of the tensors of a file; reading them shows whether it is as long as it should be."""
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  # no mapping
    except Exception as error:  # safetensors has no class of errors in common
        raise BadData(
            f"the {ref.role} {ref.path}: its {file.name} is not a whole safetensors file: {short(error)}; "
            "fetch it again"
        ) from error


def must_be_whole(model: PreTrainedModel, missing: Any, name: str) -> None:
    """Raise BadData where weights were not in the checkpoint: transformers draws them at random."""
    lacking = sorted(set(missing) - set(model.all_tied_weights_keys))
    if lacking:
        raise BadData(
            f"{name} lacks {len(lacking)} weights, such as {', '.join(lacking[:4])}: the checkpoint is not "
            "whole, or its config.json is another model's (tie_word_embeddings included)"
        )
