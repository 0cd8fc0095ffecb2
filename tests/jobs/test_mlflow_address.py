"""MLflow's address where the storage has an odd name, and addresses that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.mlflow_address import sqlite_file, tracking_problem, tracking_uri
from jobs.tracking.tracker import Tracker
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from tests.helpers.tiny import tiny_config


def tracked(storage: Path | str, **tracking: object) -> Config:
    values = {f"tracking.{name}": value for name, value in tracking.items()}
    return tiny_config({"storage": str(storage), "tracking.enabled": True, **values})


@pytest.mark.parametrize("name", ["a?b", "a?b=c", "?", "a%25b", "%3f", "a ?b%25#c"])
def test_a_storage_whose_sqlite_file_would_be_another_is_refused(tmp_path: Path, name: str) -> None:
    """The file would be made at the part before `?`, or at the decoded path."""
    with pytest.raises(ConfigError, match=r"^storage = .*MLflow cannot keep a sqlite file.*'[?%]") as caught:
        Tracker.start(tracked(tmp_path / name))
    assert "tracking.enabled=false" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is made beside it"
    assert [path.name for path in tmp_path.glob("*/*")] == [".locks"]


@pytest.mark.parametrize("name", ["a#b", "100%", "a%zz", "ä → 1", "a:b@c", "[x]*", "a;b&c=d"])
def test_other_names_are_those_of_their_file(tmp_path: Path, name: str) -> None:
    uri = tracking_uri(tracked(tmp_path / name))
    assert sqlite_file(uri) == tmp_path / name / "mlflow.db" and tracking_problem(uri) is None


def test_the_default_is_in_the_folder_that_the_run_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking_uri(tracked("~/runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_options_of_a_sqlite_address_are_no_part_of_its_file(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new.db?timeout=60&mode=rwc"
    assert sqlite_file(uri) == tmp_path / "new.db" and tracking_problem(uri) is None
    assert "holds '?'" in str(tracking_problem(f"sqlite:///{tmp_path}/new.db?60"))
    assert sqlite_file("postgresql://127.0.0.1/x") is None


@pytest.mark.parametrize(
    ("uri", "part"),
    [
        ("http://[x", "no address"),
        ("http://127.0.0.1:port", "nonnumeric port"),
        ("http://", "no host given"),
        ("sqlite:///a\0b/x.db", "cannot be written"),
        ("sqlite:///" + "n" * 300 + "/x.db", "cannot be written"),
    ],
)
def test_what_is_no_address_is_a_problem(uri: str, part: str) -> None:
    assert part in str(tracking_problem(uri))
