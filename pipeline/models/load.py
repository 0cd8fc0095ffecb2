"""Load, build and export targets and drafters: Hugging Face causal language models over our attention."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import BadData
from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model

if TYPE_CHECKING:
    from pipeline.config.models import PretrainedModel, ScratchModel

# A bar for every shard of every load would drown our own progress.
disable_progress_bar()

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
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
