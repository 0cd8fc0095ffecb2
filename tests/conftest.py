"""Tiny models and other things that many tests share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.clock import patience

if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on the CPU. Read when triton is imported, which transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import PreTrainedModel

from jobs.executors.ray_executor import RayExecutor
from jobs.stages.pipeline import run_pipeline
from pipeline.config.models import Pretrain, ScratchModel
from pipeline.models.build import build_scratch
from tests.helpers.documents import story
from tests.helpers.models import FakeTokenizer, sharpen
from tests.helpers.paths import ROOT
from tests.helpers.shared import made_once
from tests.helpers.tiny import tiny_config
from tests.helpers.toys import toy_config


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what takes long, too")
    parser.addoption("--tries", type=int, default=1, help="how often each test of a fault is tried")
    parser.addoption("--faults-page", action="store_true", help="write faults.json and docs/reliability.md")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A test's limit is longer on a slow machine. The plugin reads its option after this."""
    if config.option.timeout is None:
        config.option.timeout = patience(float(config.getini("timeout")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `make test`: a file's tests share a process, and so do all files that start a Ray.

    A machine has one address of a running Ray. The plugin's own groups are ignored under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if "mark.ray" in (config.rootpath / file).read_text() else file

    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes long: make test-long test-faults"))


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model(layers=2, seed=0, …)`: a small random Llama with grouped-query heads."""

    def make(
        layers: int = 2, hidden: int = 32, heads: int = 4, kv_heads: int = 2, seed: int = 0, mlp: int = 2
    ) -> PreTrainedModel:
        spec = ScratchModel(
            kind="scratch",
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            intermediate=mlp * hidden,
            max_positions=512,
            pretrain=Pretrain(steps=0),
        )
        return sharpen(build_scratch(spec, FakeTokenizer(), seed))  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def target(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model(layers=3, hidden=48, seed=1)


@pytest.fixture(scope="session")
def drafter(target: PreTrainedModel, make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """The target with noisy weights: it agrees with it often, not always."""
    model = make_model(layers=3, hidden=48, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.std(correction=0).nan_to_num() * noise)
    return model


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        for number in range(30):
            (folder / f"tale{number:02d}.txt").write_text(story(number))

    return made_once(tmp_path_factory, "corpus", make)


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a finished run; each process has its copy. Tests that change it copy it first."""
    made = made_once(tmp_path_factory, "runs", lambda folder: run_pipeline(toy_config(corpus, folder)))
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("finished") / "runs"))


@pytest.fixture
def storage(finished: Path, tmp_path: Path) -> Path:
    """A finished storage to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "runs"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[ModuleType]:
    """One local Ray for all tests of this process: it takes seconds to start."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where Ray's workers find the tests
        executor = RayExecutor(tiny_config({"run.executor": "ray", "run.ray_address": "local"}))
        ray = executor.ray
        executor.contexts.close()
        signal.signal(signal.SIGTERM, before)  # Ray has put its own there
        yield ray
        executor.close()


@pytest.fixture
def on_local_ray(local_ray: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Executors of this test work on the Ray that runs already, and leave it running."""
    monkeypatch.setattr(RayExecutor, "ray", local_ray)
    return local_ray
