"""Import rules: jobs → pipeline → kernels, heavy dependencies in few files, a core that runs bare."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

PACKAGES = ("kernels", "pipeline", "jobs")

# Where the distribution's name is not the module's.
MODULE_OF = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}
# Modules of distributions that come with a dependency, released together with it.
COMES_ALONG = {"pydantic_core"}
# Library → the files that may import it, as patterns.
ONLY_IN = {
    "ray": ("jobs/executors/ray_*.py", "jobs/commands/submit.py"),
    "deepspeed": ("jobs/executors/deepspeed_engine.py",),
    "mlflow": ("jobs/tracking/*.py", "jobs/registry/*.py"),
}
DECODING_CORE = (
    "kv.view_cache", "kv.policies", "kv.slot_cache", "decode.model", "decode.steps", "decode.loop",
    "decode.replay", "metrics", "models.load",
)  # fmt: skip

IMPORT_ALL = """
import importlib, sys
blocked, modules = sys.argv[1].split(","), sys.argv[2].split(",")
for name in blocked:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError, as if it were not installed
for name in modules:
    importlib.import_module(name)
"""


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(top-level module, line) of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            relative = node.level > 0
            module = path.relative_to(ROOT).parts[0] if relative else (node.module or "").split(".")[0]
            yield module, node.lineno


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(package)
        for module, line in imports(path)
        if module in forbidden
    ]


def import_without(blocked: tuple[str, ...], modules: list[str]) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(blocked), ",".join(modules)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_the_core_imports_without_ray_deepspeed_and_mlflow():
    modules = [module_name(path) for package in ("kernels", "pipeline") for path in sources(package)]
    assert {"pipeline.config.schema", "pipeline.kv.view_cache", "kernels.reference"} <= set(modules)
    import_without(("ray", "deepspeed", "mlflow", "jobs"), modules)


def test_decoding_imports_without_pydantic_and_datasets_too():
    blocked = ("ray", "deepspeed", "mlflow", "jobs", "pydantic", "datasets")
    import_without(blocked, [f"pipeline.{name}" for name in DECODING_CORE])


def test_the_gpu_benchmark_imports_on_a_bare_machine():
    blocked = ("ray", "deepspeed", "mlflow", "jobs", "pydantic", "datasets", "matplotlib", "typer", "pyarrow")
    import_without(blocked, ["benchmarks.__main__", "benchmarks.gpu", "benchmarks.kernels"])


def test_a_blocked_module_is_noticed():
    with pytest.raises(AssertionError, match="pydantic"):
        import_without(("pydantic",), ["pipeline.config.schema"])


def test_imports_run_from_jobs_to_pipeline_to_kernels():
    found = offenders("kernels", {"pipeline", "jobs", "tests"}) + offenders("pipeline", {"jobs", "tests"})
    assert not found, "\n".join(found)


def test_kernels_imports_torch_and_triton_only():
    allowed = sys.stdlib_module_names | {"torch", "triton", "kernels"}
    modules = {module for path in sources("kernels") for module, _ in imports(path)}
    assert modules <= allowed, f"kernels/ imports {sorted(modules - allowed)}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_has_its_files(library):
    found = [
        line
        for package in PACKAGES
        for line in offenders(package, {library})
        if not any(Path(line.split(":")[0]).match(pattern) for pattern in ONLY_IN[library])
    ]
    assert not found, f"only {ONLY_IN[library]} may import {library}:\n" + "\n".join(found)


def test_every_imported_library_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [canonicalize_name(Requirement(line).name) for line in project["dependencies"]]
    known = (
        sys.stdlib_module_names | set(PACKAGES) | COMES_ALONG | {MODULE_OF.get(name, name) for name in names}
    )
    imported = {module for package in PACKAGES for path in sources(package) for module, _ in imports(path)}
    unknown = [line for package in PACKAGES for line in offenders(package, imported - known)]
    assert not unknown, "not in pyproject.toml:\n" + "\n".join(unknown)
