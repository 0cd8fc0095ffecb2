"""Load, build and export targets and drafters: Hugging Face causal language models over our attention."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import BadData
from pipeline.kv.view_cache import ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.schema import PretrainedModel, ScratchModel

# A bar for every shard of every load would drown our own progress.
disable_progress_bar()

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Of a repository on the hub: what loads a model from safetensors, not its other formats or parts.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
HUB_OTHERS = ("*/*.json", "*/*.safetensors", "consolidated*")


def pick_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one.

    Raises:
        ValueError: if a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is cuda, but torch sees no GPU; set run.device: auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@dataclass(frozen=True)
class ModelRef:
    """Where a model comes from and how it is to be loaded; small enough to travel to workers.

    `rope_scaling` replaces the model's rope parameters (YaRN, linear, …, as transformers names them).
    `trained_positions` is set where the model's own config does not tell.
    """

    path: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    rope_scaling: dict[str, Any] | None = None
    trained_positions: int | None = None


def model_ref(spec: PretrainedModel | ScratchModel, scratch_folder: Path | None) -> ModelRef:
    """The reference of a config's model; a scratch model lives where stage pretrain put it."""
    if spec.kind == "scratch":
        return ModelRef(path=str(scratch_folder), dtype=spec.dtype)
    return ModelRef(
        spec.path,
        spec.dtype,
        spec.revision,
        spec.trust_remote_code,
        spec.rope_scaling,
        spec.trained_positions,
    )


def load_model(
    ref: ModelRef, num_tokens: int, device: torch.device | str = "cpu", dtype: str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, with the attention that reads view caches.

    Args:
        num_tokens: entries of the tokenizer that target and drafter share. Logits beyond it, where a
            model pads its vocabulary, are cut off.
        dtype: overrides the reference's.

    Raises:
        BadData: if the model has fewer logits than the tokenizer has tokens, or only pickled weights.
    """
    path, folder = ref.path, model_folder(ref)
    if not any((folder / name).exists() for name in WEIGHTS):
        local = os.path.isdir(path)
        download = "" if local else f"run `hf download {path} --local-dir FOLDER`, then "
        raise BadData(
            f"{path} holds no {WEIGHTS[0]}; {download}convert a .bin checkpoint once with "
            f"`budgetdraft convert {path if local else 'FOLDER'} OUTPUT` and name OUTPUT in the config"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=ref.trust_remote_code)
    except OSError as error:
        raise BadData(f"cannot load the model {path!r}: {str(error).splitlines()[0]}") from error
    if ref.rope_scaling is not None:
        config.rope_parameters = {**(config.rope_parameters or {}), **ref.rope_scaling}
    if config.vocab_size < num_tokens:
        raise BadData(
            f"{path} has {config.vocab_size} logits, but the tokenizer has {num_tokens} tokens: "
            "target and drafter must share one tokenizer"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype or ref.dtype),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=ref.trust_remote_code,
        )
    except OSError as error:
        raise BadData(f"cannot load the weights of {path!r}: {str(error).splitlines()[0]}") from error
    return prepare_model(model, num_tokens).to(device)


def model_folder(ref: ModelRef) -> Path:
    """The folder of a model: the local one that it names, or its snapshot in the hub's cache.

    Of all processes that ask for it at once, on one machine or on several that share the cache (HF_HOME),
    one downloads and the others wait for its files. With HF_HUB_OFFLINE only the cache is looked at.

    Raises:
        BadData: if there is no such folder, and the hub or the cache has no such model.
    """
    if os.path.isdir(ref.path):
        return Path(ref.path)
    wanted = [*HUB_FILES, *(["*.py"] if ref.trust_remote_code else [])]
    try:
        validate_repo_id(ref.path)
        with download_lock(ref.path):
            snapshot = snapshot_download(
                ref.path, revision=ref.revision, allow_patterns=wanted, ignore_patterns=list(HUB_OTHERS)
            )
    except (OSError, HFValidationError) as error:
        raise BadData(
            f"cannot load the model {ref.path!r}: there is no such folder, and of the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Path(snapshot)


def download_lock(hub_id: str) -> AbstractContextManager[Any]:
    """Held by whoever downloads a model: the hub's own locks are by file, and do not keep others from asking.

    Nothing is written offline: the cache may be one that this user can only read.
    """
    if constants.HF_HUB_OFFLINE:
        return nullcontext()
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(locks / f"budgetdraft--{hub_id.replace('/', '--')}.lock")


def prepare_model(model: PreTrainedModel, num_tokens: int) -> PreTrainedModel:
    """Evaluation mode, and the number of logits that stand for tokens."""
    model.num_tokens = num_tokens
    return model.eval()


def build_scratch(spec: ScratchModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A randomly initialised Llama of the given shape; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta, **(spec.rope_scaling or {})},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION)
    return prepare_model(model, len(tokenizer))


def own_positions(ref: ModelRef) -> int:
    """Positions that a pretrained model was trained on, by the config's word or else the model's."""
    if ref.trained_positions is not None:
        return ref.trained_positions
    config = AutoConfig.from_pretrained(
        ref.path, revision=ref.revision, trust_remote_code=ref.trust_remote_code
    )
    return int(config.max_position_embeddings)


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end a continuation."""
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = model.config.eos_token_id if eos is None else eos
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, list) else [eos])


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that plain `AutoModelForCausalLM.from_pretrained` loads, tokenizer included."""
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


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
