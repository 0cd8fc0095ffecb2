"""Every command that takes a storage says what is wrong with one that cannot be, on one screen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.configs import MINIMAL
from tests.jobs.cli.test_cli import as_it_was, call  # noqa: F401

COMMANDS = {
    "prepare": ("prepare", "{config}", "--storage", "{storage}"),
    "run": ("run", "{config}", "storage={text}"),
    "plan": ("plan", "{config}", "--tflops", "1", "--step-ms", "1", "--storage", "{storage}"),
    "generate": ("generate", "{config}", "--storage", "{storage}"),
    "status": ("status", "--storage", "{storage}"),
    "artifacts": ("artifacts", "{storage}"),
    "removal": ("artifacts", "{storage}", "--remove"),
}


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_folder_can_be_there(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "file").touch()
    config = tmp_path / "minimal.yaml"
    config.write_text(yaml.safe_dump(MINIMAL))
    storage = str(tmp_path / name)
    given = {"config": config, "storage": storage, "text": json.dumps(storage)}
    done = call(*(word.format(**given) for word in COMMANDS[command]), stdin=b"a prompt")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    last = done.output.splitlines()[-1]
    assert last.startswith("storage = ") and "set storage=PATH" in last and len(last) < 800
    assert "Traceback" not in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "minimal.yaml"]


def test_a_run_of_no_possible_name_is_looked_for(tmp_path: Path) -> None:
    done = call("status", "n" * 300, "--storage", str(tmp_path))
    assert done.exit_code == 3 and "no run is recorded in" in done.output
