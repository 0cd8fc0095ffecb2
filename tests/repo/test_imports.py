"""Import rules: rooms build on those below them, heavy libraries in few files, a core that runs bare."""

import ast
import json
import runpy
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

PACKAGES = ("kernels", "pipeline", "jobs")

# Where the distribution's name is not the module's.
MODULE_OF = {"prometheus-client": "prometheus_client", "huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}
# Modules of distributions that come with a dependency, released together with it.
COMES_ALONG = {"pydantic_core"}
# Library → the files that may import it, as patterns.
ONLY_IN = {
    "ray": ("jobs/executors/ray_*.py", "jobs/commands/submit.py"),
    "deepspeed": ("jobs/executors/deepspeed_engine.py",),
    "mlflow": ("jobs/tracking/*.py", "jobs/registry/*.py"),
}
# The rooms from the ground up; each imports from rooms before it alone. The ground floor is single files.
FLOORS = (
    "kernels",
    "pipeline.errors", "pipeline.units", "pipeline.markdown", "pipeline.hardware", "pipeline.metrics",
    "pipeline.intervals", "pipeline.axes", "pipeline.observe", "pipeline.store", "pipeline.kv",
    "pipeline.config", "pipeline.models", "pipeline.decode", "pipeline.data", "pipeline.sweep",
    "pipeline.train", "pipeline.results", "pipeline.report", "pipeline.gate", "pipeline.plan",
    "pipeline.serving",
    "jobs", "jobs.mlflow_address", "jobs.records", "jobs.executors", "jobs.tracking", "jobs.registry",
    "jobs.stages", "jobs.plan", "jobs.commands", "jobs.cli", "jobs.__main__",
)  # fmt: skip
MOST_MODULES = 15  # of a room
# Rooms that a bare machine decodes with: torch, triton and transformers, neither pydantic nor datasets.
BARE = ("errors", "units", "hardware", "metrics", "intervals", "axes", "kv", "decode", "models")

# Each case in a copy of one process, as the libraries that every machine has take long to import.
IMPORT_ALL = """
import importlib, json, os, sys
import torch, transformers.models.llama.modeling_llama
for case, (blocked, modules) in json.loads(sys.argv[1]).items():
    if not os.fork():
        for name in blocked:
            sys.modules[name] = None  # importing it raises ModuleNotFoundError, as if it were not installed
        sys.stderr = open(f"{sys.argv[2]}/{case}", "w", buffering=1)  # for a traceback that ends the copy
        for name in modules:
            importlib.import_module(name)
        print("imported", file=sys.stderr)
        os._exit(0)
    os.wait()
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


SCRIPTS = sorted(file for folder in (".github", ".ci", "docker") for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_scripts_outside_the_packages_find_what_they_import(script: Path):
    runpy.run_path(str(script), run_name="imported")


def test_rooms_import_without_what_they_do_not_need(tmp_path: Path):
    """The core, decoding, and the GPU's benchmark on a bare machine; the last case must fail."""
    core = [module_name(path) for package in ("kernels", "pipeline") for path in sources(package)]
    assert {"pipeline.config.schema", "pipeline.kv.view_cache", "kernels.reference"} <= set(core)
    modules = [module_name(path) for path in sources("pipeline") if room(module_name(path)).split(".")[1:]]
    decoding = [module for module in modules if module.split(".")[1] in BARE]
    assert {"pipeline.decode.loop", "pipeline.models.load", "pipeline.metrics"} <= set(decoding)
    gpu = ["benchmarks.__main__", "benchmarks.gpu_quick"]
    gpu += [module_name(path) for path in sources("benchmarks/gpu")]
    heavy = ("ray", "deepspeed", "mlflow", "jobs")
    cases = {
        "core": (heavy, core),
        "decoding": ((*heavy, "pydantic", "datasets"), decoding),
        "gpu": ((*heavy, "pydantic", "datasets", "matplotlib", "typer", "pyarrow"), gpu),
        "noticed": (("pydantic",), ["pipeline.config.schema"]),
    }
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(cases), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience(240))
    assert done.returncode == 0, done.stderr
    told = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert "pydantic" in told.pop("noticed"), "a blocked library was imported"
    assert told == dict.fromkeys(("core", "decoding", "gpu"), "imported\n"), "\n".join(told.values())


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


def room(module: str) -> str:
    """`pipeline.kv` of `pipeline.kv.views`; a file that lies in no room is its own; all kernels are one."""
    package, *rest = module.split(".")
    return package if package == "kernels" or not rest else f"{package}.{rest[0]}"


def imported_modules(path: Path) -> Iterator[tuple[str, int]]:
    """(module of this project, line) of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield (module if exists(module) else str(node.module)), node.lineno


def exists(module: str) -> bool:
    path = ROOT / Path(*module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_rooms_import_from_the_floors_below_them_alone():
    """Which also leaves no circle between rooms."""
    found = []
    for path in (path for package in PACKAGES for path in sources(package)):
        own = room(module_name(path))
        for module, line in imported_modules(path):
            if room(module) != own and FLOORS.index(room(module)) > FLOORS.index(own):
                found.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not found, "imports that run back up:\n" + "\n".join(found)


def test_no_module_imports_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in sources(package)):
        top = (node for node in ast.parse(path.read_text(encoding="utf-8")).body)
        lines = {node.lineno for node in top if isinstance(node, ast.ImportFrom)}
        graph[module_name(path)] = {
            module for module, line in imported_modules(path) if line in lines and module != module_name(path)
        }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_room_has_a_floor_and_no_room_is_crowded():
    rooms = {room(module_name(path)) for package in PACKAGES for path in sources(package)} - {"pipeline"}
    assert rooms == set(FLOORS)
    folders = Counter(
        path.parent.relative_to(ROOT)
        for package in PACKAGES
        for path in sources(package)
        if path.name != "__init__.py"
    )
    crowded = {str(folder): count for folder, count in folders.items() if count > MOST_MODULES}
    assert not crowded, f"more than {MOST_MODULES} modules: {crowded}"


def test_no_file_repeats_the_name_of_its_folder():
    repeated = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sources(package)
        if path.parent.name in path.stem.split("_")
    ]
    assert not repeated, repeated


def test_rooms_have_no_code_of_their_own():
    """What `__init__.py` imports, everybody imports who takes one file of a room. Two have a reason to."""
    with_code = {"jobs", "pipeline.serving"}
    for path in (path for package in PACKAGES for path in sources(package) if path.name == "__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        if module_name(path) not in with_code:
            assert len(body) == 1 and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
