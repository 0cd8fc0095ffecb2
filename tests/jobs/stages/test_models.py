"""Models that cannot be run end a run before its first stage writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.stages import pipeline
from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import dump_config
from pipeline.config.schema import Config
from pipeline.errors import BadData
from pipeline.models.weights import WEIGHTS
from tests.helpers.tiny import tiny_config
from tests.helpers.zoo import saved, tiny


def pair(folder: Path, name: str, changes: dict[str, Any]) -> Config:
    """A target of this kind and a Llama, on sequences of 96 tokens."""
    models = {"target": tiny(name, **changes), "drafter": tiny("llama")}
    for role, config in models.items():
        saved(config, folder / role)
    specs = {role: {"kind": "pretrained", "path": str(folder / role)} for role in models}
    return tiny_config({"data.tokenizer": {"kind": "target"}, "storage": str(folder / "runs"), **specs})


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("falcon", {}, "does not attend through transformers' attention interface"),
        ("deepseek_v3", {}, "heads of several shapes for keys and values"),
        ("mistral", {}, "a sliding window of 40 tokens, and texts get 96 tokens long"),
        ("gpt2", {}, "64 learned positions and no more"),
    ],
)
@pytest.mark.parametrize("command", ["run", "teach"])
def test_exit_code_3_and_no_storage(
    tmp_path: Path, command: str, name: str, changes: dict[str, Any], part: str
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(dump_config(pair(tmp_path, name, changes)))
    done = CliRunner().invoke(app, [command, str(file)])
    assert done.exit_code == 3, done.output
    told = " ".join(done.output.split())
    assert f"cannot run the target '{tmp_path / 'target'}': {name}" in told and part in told
    assert not (tmp_path / "runs").exists()


def test_a_torn_checkpoint_is_found_as_early(tmp_path: Path) -> None:
    config = pair(tmp_path, "llama", {})
    file = tmp_path / "drafter" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        BadData, match=r"the drafter .*: its model\.safetensors is not a whole safetensors file"
    ):
        run_pipeline(config)
    assert not (tmp_path / "runs").exists()


def test_what_can_be_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that no text reaches; what stage prepare would do is another matter."""
    begun = []

    def prepare(*args: Any) -> Any:
        begun.append(args)
        raise BadData("stage prepare")

    monkeypatch.setattr(pipeline, "prepare", prepare)
    with pytest.raises(BadData, match="stage prepare"):
        run_pipeline(pair(tmp_path, "mistral", {"sliding_window": 96}))
    assert begun
