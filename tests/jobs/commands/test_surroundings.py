"""What the doctor says of storage, MLflow and Ray: a fault is a line of its own, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.commands import surroundings
from jobs.commands.surroundings import Check
from pipeline.config.schema import Config
from tests.helpers.mlflow_server import free_port
from tests.helpers.tiny import tiny_config


def checks(config: Config) -> dict[str, Check]:
    found = [*surroundings.storage(config), surroundings.tracking(config), surroundings.ray(config)]
    return {check.name: check for check in found}


def config_of(storage: Path | str, **changes: Any) -> Config:
    return tiny_config({"storage": str(storage), "tracking.enabled": True, **changes})


@pytest.mark.parametrize("name", ["file", "file/below", "loop", "n" * 300])
def test_a_storage_that_cannot_be_fails_in_both_lines(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    found = checks(config_of(tmp_path / name))
    for line in ("storage", "tracking"):
        assert found[line].status == "fail" and "storage = " in found[line].text
        assert "set storage=PATH" in found[line].text
    assert "free space" not in found and found["ray"].status == "ok"


def test_a_storage_below_home_is_made_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "folder"))
    found = checks(config_of("~/runs"))
    assert found["storage"].text == f"{tmp_path}/folder/runs can be written"
    assert found["tracking"] == Check("ok", "tracking", f"sqlite:///{tmp_path}/folder/runs/mlflow.db")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "runs"], "and none named ~"


def test_a_storage_whose_name_mlflow_cannot_keep(tmp_path: Path) -> None:
    found = checks(config_of(tmp_path / "a?b"))
    assert found["storage"].status == "ok"
    assert found["tracking"].status == "fail" and "holds '?'" in found["tracking"].text
    assert checks(config_of(tmp_path / "a?b", **{"tracking.enabled": False}))["tracking"].status == "ok"


def test_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    ray = {"run.executor": "ray"}
    assert checks(config_of(tmp_path))["ray"].text == "not used by --executor inline"
    assert checks(config_of(tmp_path, **ray))["ray"] == Check("ok", "ray", "a Ray of its own, in /tmp/ray")
    address = f"127.0.0.1:{free_port()}"
    found = checks(config_of(tmp_path, **ray, **{"run.ray_address": address}))["ray"]
    assert found.status == "fail" and f"run.ray_address = {address}: nothing answers" in found.text
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 70 * "n")
    found = checks(config_of(tmp_path, **ray))["ray"]
    assert found.status == "fail" and found.text.startswith("RAY_TMPDIR = /tmp/n")
