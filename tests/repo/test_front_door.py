"""The front door: make, the pinned environment, and what README and docs tell people to type."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.cli.app import EPILOG
from jobs.cli.main import app
from pipeline.config.files import load_config
from tests.helpers.clock import patience
from tests.helpers.paths import ROOT

# Pages with commands of this program. Those of the other pages run over several lines, or in containers.
DOCS = (
    "README.md", "CONTRIBUTING.md", "conf/README.md", "docs/cli.md", "docs/findings.md", "docs/gate.md",
    "docs/method.md", "docs/registry.md", "docs/running.md", "docs/storage.md", "docs/watching.md",
    "docs/words.md",
)  # fmt: skip

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Without the variables of the make that may be running these tests.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    return subprocess.run(
        ["make", "-C", str(folder), "--no-print-directory", *arguments],
        env=environment, capture_output=True, text=True, timeout=patience(60),
    )  # fmt: skip


# ── make ──────────────────────────────────────────────────────────────────────────────────────────


@needs_make
def test_help_is_the_default_and_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony
    shown = make(ROOT)
    assert shown.returncode == 0, shown.stderr
    assert re.findall(r"^  make (\S+) +\S", shown.stdout, re.MULTILINE) == phony[1].split()
    assert {"help", "setup", "demo", "test", "lint", "clean"} <= set(phony[1].split())


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """A folder with our Makefile and a stand-in `python` that writes down its arguments in `calls`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'cd "$(dirname "$0")"; while [ ! -f Makefile ]; do cd ..; done\n'
        'case "$1 $2 $3" in\n'
        '"-m venv "*) echo venv >> calls; mkdir -p .venv/bin; cp python .venv/bin/python ;;\n'
        '"-m pip install") echo install >> calls; [ ! -e pip_fails ] ;;\n'
        '"-c import sys"*) [ ! -e too_old ] ;;\n'
        "--version*) echo Python 3.10.1 ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    return tmp_path


def calls(folder: Path) -> list[str]:
    log = folder / "calls"
    lines = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


@needs_make
def test_setup_runs_only_when_something_changed(fake_python: Path):
    arguments = ("setup", f"PYTHON={fake_python / 'python'}")
    assert make(fake_python, *arguments).returncode == 0
    assert calls(fake_python) == ["venv", "install"]
    assert make(fake_python, *arguments).returncode == 0
    assert calls(fake_python) == []
    for name in ("constraints.txt", "pyproject.toml"):
        later = (fake_python / ".venv" / ".installed").stat().st_mtime + 5
        os.utime(fake_python / name, (later, later))
        os.utime(fake_python / ".venv" / ".installed", (later - 1, later - 1))
        assert make(fake_python, *arguments).returncode == 0
        assert calls(fake_python) == ["install"]
        os.utime(fake_python / ".venv" / ".installed", (later + 1, later + 1))


@needs_make
def test_a_failed_setup_is_repaired_by_the_next_one(fake_python: Path):
    arguments = ("setup", f"PYTHON={fake_python / 'python'}")
    (fake_python / "pip_fails").touch()
    assert make(fake_python, *arguments).returncode != 0
    (fake_python / "pip_fails").unlink()
    assert calls(fake_python) == ["venv", "install"]
    assert make(fake_python, *arguments).returncode == 0
    assert calls(fake_python) == ["install"]
    (fake_python / ".venv" / "bin" / "python").unlink()
    (fake_python / ".venv" / ".installed").unlink()
    assert make(fake_python, *arguments).returncode == 0
    assert calls(fake_python) == ["venv", "install"]


@needs_make
def test_setup_refuses_an_old_python(fake_python: Path):
    (fake_python / "too_old").touch()
    refused = make(fake_python, "setup", f"PYTHON={fake_python / 'python'}")
    assert refused.returncode != 0
    assert "needs Python 3.11 or newer" in refused.stderr and "Python 3.10.1" in refused.stderr
    assert calls(fake_python) == []


def test_ci_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK), ".ci/run is not executable"
    assert "make lint test test-slow" in script.read_text(encoding="utf-8").splitlines()


# ── the environment ───────────────────────────────────────────────────────────────────────────────


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    loose = [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not loose, f"constraints.txt must pin by == and without local suffix: {loose}"
    names = [canonicalize_name(line.split("==")[0]) for line in pinned]
    assert len(names) == len(set(names)), "constraints.txt names a distribution twice"
    return dict(zip(names, (line.split("==")[1] for line in pinned), strict=True))


def test_every_direct_dependency_is_pinned_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = pins()
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{line!r} excludes the pinned {pinned[name]}"


# ── what the pages say ────────────────────────────────────────────────────────────────────────────


def code_blocks(language: str) -> list[str]:
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCS)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def documented_commands() -> list[list[str]]:
    """Argument lists of every `budgetdraft …` in code blocks and inline code, `python -m jobs …` included."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in DOCS)
    snippets = [line for block in code_blocks("sh") for line in block.splitlines()]
    snippets += re.findall(r"`([^`\n]+)`", text)
    found = [re.search(r"(?:\bbudgetdraft|-m jobs) ([a-z].*)$", snippet) for snippet in snippets]
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_documented_commands_and_options_exist():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    documented = documented_commands()
    assert {"run", "config", "doctor"} <= {arguments[0] for arguments in documented}
    for command, *arguments in documented:
        assert command in commands, f"there is no command {command!r}"
        known = {option for parameter in commands[command].params for option in parameter.opts}
        unknown = [word for word in arguments if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{command} has no option {unknown}"


def test_every_command_is_documented():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {arguments[0] for arguments in documented_commands()}


def test_exit_codes_are_those_of_help():
    section = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("## Exit codes")[1]
    documented = re.findall(r"^\| (\d+) \|", section, re.MULTILINE)
    assert documented == re.findall(r"^  (\d+) ", EPILOG.split("Exit codes:")[1], re.MULTILINE)


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in code_blocks("sh"):
        for target in re.findall(r"^make (\S+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"there is no make target {target!r}"


def test_the_configs_in_pages_are_valid(tmp_path: Path):
    """Whole ones, ones that extend a shipped config, and parts of one, which are put on top of the demo's."""
    blocks = code_blocks("yaml")
    assert len(blocks) >= 4
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    for block in blocks:
        whole = re.search(r"^(name|extends):", block, re.MULTILINE)
        file = tmp_path / "page.yaml"
        file.write_text(block if whole else f"extends: conf/quickstart.yaml\n{block}", encoding="utf-8")
        config = load_config(file, ["train.steps=500"])
        assert config.train.steps == 500


def test_readme_names_the_two_commands():
    assert re.findall(r"^make (\S+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE) == [
        "demo", "test",
    ]  # fmt: skip
