"""Secrets stay where they were given, files run no code, paths stay in the storage, servers on loopback."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError

from pipeline.config import yaml_text
from pipeline.config.schema import Config
from tests.helpers.clock import patience
from tests.helpers.configs import MINIMAL
from tests.helpers.fault_toy import make_toy
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.paths import ROOT

# ── secrets, and what a run writes ────────────────────────────────────────────────────────────────

SECRETS = {
    name: f"planted-{number}-e7c1a9"
    for number, name in enumerate(("hf", "mlflow", "hf file", "ray file", "uri user", "uri password"))
}


class Run:
    """A small whole run in a folder of its own: output, and what was in the folder before."""

    def __init__(self, folder: Path, server: MlflowServer) -> None:
        self.folder, self.storage = folder, folder / "runs"
        toy = make_toy(folder)
        values = yaml.safe_load(toy.config.read_text())
        # Sources may be read from anywhere; what is made of them may not go there.
        (folder / "elsewhere").mkdir()
        (folder / "corpus").rename(folder / "elsewhere" / "corpus")
        values["data"]["root"] = str(folder / "elsewhere" / "corpus" / "..")
        values["data"]["sources"][0]["files"] = [
            "../elsewhere/corpus/*1*.txt",
            str(folder / "elsewhere/corpus/*2*"),
        ]
        toy.config.write_text(yaml.safe_dump(values))
        for name in ("hf file", "ray file"):
            (folder / name).write_text(SECRETS[name])
        (folder / "home").mkdir()
        self.before = self.files()
        user = f"{SECRETS['uri user']}:{SECRETS['uri password']}"
        self.done = subprocess.run(
            [
                sys.executable, "-m", "jobs", "run", str(toy.config), f"storage={self.storage}",
                "tracking.enabled=true", f"tracking.uri=http://{user}@127.0.0.1:{server.port}",
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "HOME": str(folder / "home"),
                "HF_TOKEN": SECRETS["hf"],
                "HF_TOKEN_PATH": str(folder / "hf file"),
                "MLFLOW_TRACKING_PASSWORD": SECRETS["mlflow"],
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(folder / "ray file"),
            },
            capture_output=True,
            timeout=patience(240),
        )  # fmt: skip

    def files(self) -> set[Path]:
        return {file for file in self.folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, server: MlflowServer) -> Run:
    made = Run(tmp_path_factory.mktemp("run"), server)
    assert made.done.returncode == 0, made.done.stderr.decode()
    return made


@pytest.mark.slow
def test_secrets_reach_no_file_and_no_output(run: Run, server: MlflowServer) -> None:
    kept = {"stdout": run.done.stdout, "stderr": run.done.stderr}
    for folder in (run.storage, server.folder):
        kept |= {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    # That the run was mirrored, and that the bytes are searched where a secret would stand.
    assert any(b"multi_view" in data for name, data in kept.items() if name.endswith("server.db"))
    assert any(b"tracking" in data for name, data in kept.items() if name.endswith("config.yaml"))
    found = [
        f"{what} in {name}"
        for name, data in kept.items()
        for what, secret in SECRETS.items()
        if secret.encode() in data
    ]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_a_run_writes_into_its_storage_only(run: Run) -> None:
    written = run.files() - run.before
    assert len(written) > 20
    caches = run.folder / "home"  # of libraries, such as fonts
    assert not [file for file in written if run.storage not in file.parents and caches not in file.parents]


# ── names ─────────────────────────────────────────────────────────────────────────────────────────

NAMED: dict[str, tuple[str | int, ...]] = {
    "name": ("name",),
    "source": ("data", "sources", 0, "name"),
    "context": ("data", "contexts", 0, "name"),
    "variant": ("train", "variants", 0, "name"),
}


@pytest.mark.parametrize("field", NAMED)
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", ".hidden", "a\0b", "a\nb", "-rf", ""])
def test_names_that_lead_elsewhere_are_refused(field: str, name: str) -> None:
    values: Any = copy.deepcopy(MINIMAL)
    Config.model_validate(values)
    *groups, last = NAMED[field]
    group = values
    for step in groups:
        group = group[step]
    group[last] = name
    with pytest.raises(ValidationError, match="name"):
        Config.model_validate(values)


# ── code ──────────────────────────────────────────────────────────────────────────────────────────

UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN = {
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "torch.save",
    "yaml.unsafe_load",
}


def sources() -> list[Path]:
    return [
        file for package in ("pipeline", "kernels", "jobs") for file in sorted((ROOT / package).rglob("*.py"))
    ]


def dangers(text: str) -> list[str]:
    """Lines that load or write pickles, or run text as code or as a shell command."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            # The error is caught by its name; nothing of the module is called.
            bad = ast.unparse(node.value) in UNPICKLING and node.attr != "UnpicklingError"
        elif isinstance(node, ast.ImportFrom):
            bad = (node.module or "").split(".")[0] in UNPICKLING
        elif isinstance(node, ast.Import):
            # Under another name, a module would pass by what is looked for.
            known = {"os", "pickle", "subprocess", "torch", "yaml"}
            bad = any(a.name in UNPICKLING - {"pickle"} or (a.name in known and a.asname) for a in node.names)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            bad = (
                name in FORBIDDEN
                or (name == "torch.load" and given.get("weights_only") != "True")
                or (name in ("yaml.load", "yaml.load_all") and given.get("Loader") != "_Loader")
                or given.get("shell", "False") != "False"
                or given.get("allow_pickle", "False") != "False"
            )
        else:
            continue
        if bad:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import dill",
        "import pickle as p",
        "import subprocess as s",
        "from pickle import loads",
        "from joblib import load",
        "pickle.loads",
        "torch.save(x, f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scan_finds(line: str) -> None:
    assert dangers(f"x = 1\n{line}") == [f"line 2: {line}"]
    assert not dangers(
        "torch.load(f, weights_only=True)\nyaml.load(t, Loader=_Loader)\nnp.load(f, mmap_mode='r')"
    )


def test_no_file_can_run_code_and_nothing_reaches_a_shell() -> None:
    assert issubclass(yaml_text._Loader, yaml.SafeLoader)
    found = [f"{file.relative_to(ROOT)}, {line}" for file in sources() for line in dangers(file.read_text())]
    assert not found, "\n".join(found)


# ── servers ───────────────────────────────────────────────────────────────────────────────────────


LOOPBACK = "127.0.0.1"
HOST = re.compile(
    r"0\.0\.0\.0|\[::\]|--(?:dashboard-)?host[= ](?!127\.0\.0\.1)|dashboard_host=(?!.127\.0\.0\.1)"
)


def test_nothing_listens_beyond_this_machine_unless_told() -> None:
    """What code starts, and the commands that pages show; where neither names a host, Ray takes this one."""
    pages = [ROOT / "Makefile", ROOT / "README.md", ROOT / ".ci" / "run", *(ROOT / "docs").rglob("*.md")]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in (*sources(), *pages)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if HOST.search(line)
    ]
    assert not found, "\n".join(found)
    assert inspect.signature(ray.init).parameters["dashboard_host"].default == LOOPBACK
    for bad in ("ray start --head --dashboard-host=::", "mlflow server --host 10.0.0.1", "bind 0.0.0.0"):
        assert HOST.search(bad)
