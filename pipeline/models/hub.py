"""The folder of a model: a local one, or its snapshot from the hub."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from pipeline.errors import BadData
from pipeline.store.storage import with_home

if TYPE_CHECKING:
    from pipeline.config.models import PretrainedModel
    from pipeline.models.load import ModelRef

# Of a repository on the hub: what loads a model from safetensors, not its other formats or parts.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
HUB_OTHERS = ("*/*.json", "*/*.safetensors", "consolidated*")


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


def config_folder(path: str, revision: str | None = None) -> Path | None:
    """Where on this machine the config.json of a model is, a local one or one of the hub; None if nowhere.

    The hub is not asked.
    """
    folder = with_home(path)
    if folder.is_dir():
        return folder if (folder / "config.json").exists() else None
    try:
        file = try_to_load_from_cache(path, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) and Path(file).exists() else None


def config_here(spec: PretrainedModel, role: str) -> Path:
    """The same of a model of the config that is needed; `role` is the field that names it.

    Raises:
        BadData: if it is not on this machine.
    """
    folder = config_folder(spec.path, spec.revision)
    if folder is None and not Path(spec.path).is_dir() and not spec.may_be_on_hub:
        raise BadData(f"{role}.path = {spec.path}: there is no such folder")
    if folder is None:
        raise BadData(
            f"{role}.path = {spec.path}: its config.json is not on this machine. Download it "
            f"(`hf download {spec.path} config.json`) or name a local folder in {role}.path"
        )
    return folder


def download_lock(hub_id: str) -> AbstractContextManager[Any]:
    """Held by whoever downloads a model: the hub's own locks are by file, and do not keep others from asking.

    Nothing is written offline: the cache may be one that this user can only read.
    """
    if constants.HF_HUB_OFFLINE:
        return nullcontext()
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return WeakFileLock(locks / f"budgetdraft--{hub_id.replace('/', '--')}.lock")


def model_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change (ns) of a model's files, by name; empty for what is no folder."""
    files = sorted(file for file in folder.glob("*") if file.suffix in (".json", ".safetensors"))
    return {file.name: (stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]}
