"""`budgetdraft doctor`: what is wrong with this machine or this config, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jobs.commands.surroundings import Check, ray, storage, tracking
from pipeline.config.models import PretrainedModel, Role
from pipeline.config.schema import Config
from pipeline.errors import BadData, ConfigError
from pipeline.hardware import machine_memory
from pipeline.store.storage import with_home

DISTRIBUTION = "budgetdraft"


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
        yield Check("ok", "config", "none given: storage, tracking, Ray, data and models are not checked")
        return
    yield from storage(config)
    yield tracking(config)
    yield ray(config)
    if clash.status == "ok":  # these import transformers
        yield from _sources(config)
        models = [check for role in config.models for check in _model(config, role)]
        yield from models
        if not any(check.status == "fail" for check in models):
            yield from _positions(config)
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
    yield Check("ok", "cpu", f"{cpus} cores, {machine_memory() / 2**30:.0f} GiB")
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


def _sources(config: Config) -> Iterator[Check]:
    from pipeline.data.sources.registry import make_readers

    if config.data.prepared is not None:
        from jobs.stages.prepare import prepared_elsewhere

        try:
            artifact = prepared_elsewhere(config, Path(config.data.prepared))
        except BadData as error:
            yield Check("fail", "data", str(error))
        else:
            yield Check("ok", "data", f"{artifact.path}, prepared elsewhere")
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


def _model(config: Config, role: Role) -> Iterator[Check]:
    """Whether a model is there and can be run; a model to be trained has a line only where it cannot."""
    from pipeline.models.check import check_role

    model = config.models[role]
    place = _place(role, model) if isinstance(model, PretrainedModel) else None
    if place is None or place.status != "fail":
        try:
            check_role(config, role)
        except BadData as error:
            place = Check("fail", role, str(error))
    if place:
        yield place


def _positions(config: Config) -> Iterator[Check]:
    """Texts that are longer than a model is built for: allowed, and seldom meant."""
    from pipeline.models.check import beyond_positions

    try:
        yield from (Check("warn", "positions", note) for note in beyond_positions(config))
    except BadData as error:
        yield Check("fail", "positions", str(error))


def _place(role: Role, model: PretrainedModel) -> Check:
    folder = with_home(model.path)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            return Check("fail", role, f"{folder} has no config.json: it is not a Hugging Face model folder")
        return Check("ok", role, str(folder))
    if not model.may_be_on_hub:
        return Check("fail", role, f"{role}.path = {model.path}: there is no such folder")
    return _hub(role, model.path, "model")


def _compiler(config: Config) -> Check:
    """What `decode.compile` needs of this machine."""
    if config.decode.compile == "none":
        return Check("ok", "compiler", "not needed (decode.compile: none)")
    from pipeline.decode.runner import cpp_compiler

    compiler = cpp_compiler()
    if compiler is None:
        return Check("fail", "compiler", "inductor needs a C++ compiler: install g++, or decode.compile=none")
    return Check("ok", "compiler", f"{compiler}, for decode.compile: {config.decode.compile}")


def _hub(name: str, repository: str, kind: Literal["dataset", "model"]) -> Check:
    """Whether the user here can reach a repository on the hub, or has downloaded something of it before."""
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
    except (HTTPError, OSError) as error:  # HTTPError is of the HTTP client that the library uses
        return Check("fail", name, f"{constants.ENDPOINT} is out of reach ({error}); {advice}")
    return Check("ok", name, f"{repository}, on the hub")


def _deepspeed(config: Config) -> Check:
    if config.run.executor == "inline":
        return Check("ok", "deepspeed", "not used by --executor inline")
    from jobs.executors.ray_train import read_settings
    from pipeline.train.sharding import sharding_of

    try:
        settings = read_settings(config.train.deepspeed)
    except BadData as error:
        return Check("fail", "deepspeed", str(error))
    sharding = sharding_of(settings, config.train.num_workers)
    where = ", optimizer on the CPU" if sharding.offload else ""
    return Check("ok", "deepspeed", f"{config.train.deepspeed}, ZeRO stage {sharding.stage}{where}")
