"""`budgetdraft doctor`: what is wrong with this machine or this config, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.models import PretrainedModel
from pipeline.config.schema import Config
from pipeline.errors import BadData, ConfigError, hide_credentials

DISTRIBUTION = "budgetdraft"
LOW_SPACE_GB = 10.0
NO_SPACE_GB = 1.0


@dataclass(frozen=True)
class Check:
    """One line of the table. `text` says what was found and, unless ok, what to do."""

    status: Literal["ok", "warn", "fail"]
    name: str
    text: str


def check_name_clash() -> None:
    """Raise ConfigError where Hugging Face's optional `kernels` distribution is installed. Cheap."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    raise ConfigError(
        f"the distribution `kernels` {version} is installed: transformers would import it when it loads a "
        "Llama and would find this project's package of that name; run: pip uninstall kernels"
    )


def doctor(config: Config | None) -> int:
    """Print the table of checks; returns 0 if none failed, else 4."""
    failed = False
    for check in _checks(config):
        failed |= check.status == "fail"
        print(f"{check.status:<5} {check.name:<14} {check.text}", flush=True)
    return 4 if failed else 0


def _checks(config: Config | None) -> Iterator[Check]:
    yield from _versions()
    clash = _name_clash()
    yield clash
    yield from _devices(config)
    if config is None:
        yield Check("ok", "config", "none given: storage, tracking, data and models are not checked")
        return
    yield from _storage(config)
    yield _tracking(config)
    if clash.status == "ok":  # reading data imports transformers
        yield from _sources(config)
    for role, model in (("target", config.target), ("drafter", config.drafter)):
        if isinstance(model, PretrainedModel):
            yield _model(role, model)
    yield _deepspeed(config)
    yield _compiler(config)


def _versions() -> Iterator[Check]:
    yield Check("ok", "python", f"{sys.version.split()[0]} at {sys.executable}")
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "fail", "versions", "budgetdraft is not installed: run `make setup` or `pip install -e .`"
        )
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        needed = f"needs {requirement.name}{requirement.specifier}: run `make setup`"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check("fail", requirement.name, f"not installed; {needed}")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check("ok" if fits else "fail", requirement.name, version if fits else f"{version}; {needed}")


def _name_clash() -> Check:
    try:
        check_name_clash()
    except ConfigError as error:
        return Check("fail", "name clash", str(error))
    return Check("ok", "name clash", "no other distribution named kernels")


def _devices(config: Config | None) -> Iterator[Check]:
    cpus = len(os.sched_getaffinity(0))
    yield Check("ok", "cpu", f"{cpus} cores")
    try:
        import torch
    except ImportError as error:
        yield Check("fail", "cuda", f"torch does not import ({error}): run `make setup`")
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Check(
            "ok", "cuda", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, torch {torch.__version__}"
        )
    if torch.cuda.device_count() == 0:
        needed = config is not None and (config.run.device == "cuda" or config.run.gpus_per_task > 0)
        text = f"no GPU that torch {torch.__version__} can use"
        if needed:
            text += (
                "; the config asks for one: set run.device=cpu run.gpus_per_task=0, or install CUDA's torch"
            )
        yield Check("fail" if needed else "ok", "cuda", text)


def _storage(config: Config) -> Iterator[Check]:
    from pipeline.store.files import write_text

    folder = Path(config.storage).expanduser()
    probe = folder / f".doctor-{os.getpid()}"
    try:
        write_text(probe, "written, synced and renamed\n")
        probe.unlink()
    except OSError as error:
        yield Check("fail", "storage", f"{folder.resolve()} cannot be written: {error}; set storage=PATH")
        return
    yield Check("ok", "storage", f"{folder.resolve()} can be written")
    free = shutil.disk_usage(folder).free / 1e9
    status: Literal["ok", "warn", "fail"] = "ok" if free >= LOW_SPACE_GB else "warn"
    hint = "" if status == "ok" else "; labels and checkpoints may need more: free some, or set storage=PATH"
    yield Check("fail" if free < NO_SPACE_GB else status, "free space", f"{free:.1f} GB{hint}")
    joins = config.run.executor == "ray" and config.run.ray_address not in (None, "local")
    if joins and not folder.is_absolute():
        yield Check("warn", "storage", "is relative: on a cluster give an absolute path that all nodes share")


def _tracking(config: Config) -> Check:
    if not config.tracking.enabled:
        return Check("ok", "tracking", "off (tracking.enabled: false)")
    from jobs.mlflow_address import tracking_problem, tracking_uri

    uri = tracking_uri(config)
    problem = tracking_problem(uri)
    shown = hide_credentials(uri)
    if problem:
        return Check("fail", "tracking", f"{shown}: {problem}; or set tracking.enabled=false")
    return Check("ok", "tracking", shown)


def _sources(config: Config) -> Iterator[Check]:
    from pipeline.data.sources.registry import make_readers

    if config.data.prepared is not None:
        from jobs.stages.prepare import prepared_elsewhere

        try:
            found = prepared_elsewhere(config, Path(config.data.prepared))
        except BadData as error:
            yield Check("fail", "data", str(error))
        else:
            yield Check("ok", "data", f"{found.path}, prepared elsewhere")
        return
    try:
        readers = make_readers(config.data, config.seed)
    except BadData as error:
        yield Check("fail", "data", str(error))
        return
    for name, reader in readers.items():
        path: Any = getattr(reader.source, "path", None)
        if reader.on_hub:
            yield _hub(f"data {name}", path, "dataset")
            continue
        try:
            shards = reader.shards()
        except BadData as error:
            yield Check("fail", f"data {name}", str(error))
        else:
            yield Check("ok", f"data {name}", f"{path or 'local files'}, {len(shards)} shards")


def _model(role: str, model: PretrainedModel) -> Check:
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            return Check("fail", role, f"{folder} has no config.json: it is not a Hugging Face model folder")
        if not any(folder.glob("*.safetensors")):
            return Check("fail", role, f"{folder} has no .safetensors: run `budgetdraft convert` on it first")
        return Check("ok", role, str(folder))
    if not model.may_be_on_hub:
        return Check("fail", role, f"{role}.path = {model.path}: there is no such folder")
    return _hub(role, model.path, "model")


def _compiler(config: Config) -> Check:
    """What `decode.compile` needs of this machine."""
    if config.decode.compile == "none":
        return Check("ok", "compiler", "not needed (decode.compile: none)")
    from pipeline.decode.runner import cpp_compiler

    found = cpp_compiler()
    if found is None:
        return Check("fail", "compiler", "inductor needs a C++ compiler: install g++, or decode.compile=none")
    return Check("ok", "compiler", f"{found}, for decode.compile: {config.decode.compile}")


def _hub(name: str, repository: str, kind: Literal["dataset", "model"]) -> Check:
    """Whether the hub has it for who is logged in here, or whether something of it was downloaded before."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
    if cached.exists():
        return Check("ok", name, f"{repository}, downloaded before to {cached}")
    if constants.HF_HUB_OFFLINE:
        return Check(
            "fail", name, f"{repository} is not in {cached.parent}, and HF_HUB_OFFLINE forbids to ask"
        )
    advice = "download it elsewhere and give its folder as the path"
    try:
        HfApi(constants.ENDPOINT).repo_info(repository, repo_type=kind, timeout=10)
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            return Check(
                "warn", name, f"{repository}: not public or misspelt; `hf auth login` helps if gated"
            )
        return Check("fail", name, f"{constants.ENDPOINT} answers {code}; try again later, or {advice}")
    except (HTTPError, OSError) as error:  # the first is of the client that the library uses
        return Check("fail", name, f"{constants.ENDPOINT} is out of reach ({error}); {advice}")
    return Check("ok", name, f"{repository}, on the hub")


def _deepspeed(config: Config) -> Check:
    file = Path(config.train.deepspeed)
    if config.run.executor == "inline":
        return Check("ok", "deepspeed", "not used by --executor inline")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Check("fail", "deepspeed", f"train.deepspeed = {file} cannot be read: {error}")
    if not isinstance(settings, dict):
        return Check("fail", "deepspeed", f"train.deepspeed = {file} must hold a JSON object")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    return Check("ok", "deepspeed", f"{file}, ZeRO stage {stage}")
