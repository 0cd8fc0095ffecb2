"""Pickled checkpoints into safetensors."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import BadData

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def convert_bin(source: Path, output: Path) -> None:
    """Turn a folder with a pickled `pytorch_model.bin`, whole or in shards, into one with safetensors.

    Only tensors are read: a pickle that would run code is refused.

    Raises:
        BadData: if `source` has no such checkpoint or one that does not fit its config, or `output` exists.
    """
    if output.exists():
        raise BadData(f"{output} exists; name a new folder")
    state: dict[str, Tensor] = {}
    for file in pickled_files(source):
        try:
            state |= torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise BadData(f"{file} is not a whole checkpoint of tensors: {error}") from error
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BadData(f"{source}: its config.json cannot be used: {str(error).splitlines()[0]}") from error
    model = AutoModelForCausalLM.from_config(config, dtype=next(iter(state.values())).dtype)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise BadData(f"{source}: the checkpoint does not fit its config: {error}") from error
    model.tie_weights()
    lost = [key for key in missing if key not in model.all_tied_weights_keys]
    unknown = [key for key in unexpected if not key.endswith("rotary_emb.inv_freq")]
    if lost or unknown:
        raise BadData(f"{source}: the checkpoint does not fit its config; missing {lost}, unknown {unknown}")
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    for file in source.iterdir():
        wanted = file.suffix in {".json", ".jinja", ".model", ".txt"} and file.name != PICKLED[1]
        if wanted and not (temporary / file.name).exists():
            shutil.copyfile(file, temporary / file.name)
    temporary.rename(output)


def pickled_files(folder: Path) -> list[Path]:
    """The pickled checkpoint files of a model folder, as its index names them where there are shards."""
    if not folder.is_dir():
        raise BadData(
            f"{folder} is not a folder; a model of the hub is downloaded first with "
            "`hf download ID --local-dir FOLDER`"
        )
    single, index = folder / PICKLED[0], folder / PICKLED[1]
    if index.exists():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [single]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise BadData(f"{folder} holds no {', '.join(absent)}")
    return files
