"""Who is champion, on a real MLflow: promoted, rolled back, lost, cut off in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.registry.champion import champion_of, move_champion, promote, rollback
from jobs.registry.versions import registry, resolve
from pipeline.errors import BadData, Incomplete

ASKED = {"margins": {"acceptance": 0.02, "speed": None}, "error_rate": 0.025}


@dataclass
class Model:
    """A registered model of empty versions 1, 2 and 3, each with a run of its own."""

    uri: str
    name: str
    folder: Path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri, self.uri)

    def gate(self, candidate: int, baseline: int | None, /, **changes: Any) -> Path:
        side = None if baseline is None else {"version": baseline}
        said = {"verdict": "pass", "model": self.name, "candidate": {"version": candidate}, "baseline": side}
        (self.folder / "gate.json").write_text(json.dumps(said | {"gate": ASKED} | changes))
        return self.folder / "gate.json"

    def promote(self, number: int, /, again: bool = False) -> int | None:
        """Against whoever is champion."""
        gate = self.gate(number, self.champion)
        return promote(resolve(self.uri, self.name, str(number)), gate, again)

    def rollback(self, to: int | None = None) -> tuple[int | None, int]:
        return rollback(self.uri, self.name, to)

    @property
    def champion(self) -> int | None:
        number = self.client.get_registered_model(self.name).aliases.get("champion")
        return None if number is None else int(number)

    def tags(self, number: int) -> dict[str, str]:
        return dict(self.client.get_model_version(self.name, str(number)).tags)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("champions")
    found = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(found).create_experiment("empty", artifact_location=(folder / "artifacts").as_uri())
    return found


@pytest.fixture
def model(uri: str, tmp_path: Path) -> Model:
    made = Model(uri, tmp_path.name, tmp_path)
    made.client.create_registered_model(made.name)
    experiment = made.client.get_experiment_by_name("empty").experiment_id
    for _ in range(3):
        run = made.client.create_run(experiment).info.run_id
        made.client.create_model_version(made.name, f"runs:/{run}/hf_model", run)
    return made


@contextmanager
def cut_off(monkeypatch: pytest.MonkeyPatch, method: str, after: bool) -> Iterator[None]:
    """MLflow is gone when the method is called, or when it has done its work and is about to answer."""
    from mlflow.exceptions import MlflowException

    real: Callable[..., Any] = getattr(MlflowClient, method)

    def gone(*arguments: Any) -> None:
        if after:
            real(*arguments)
        raise MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, method, gone)
        yield


# ── forward ───────────────────────────────────────────────────────────────────────────────────────


def test_what_the_gate_was_asked_is_kept(model: Model) -> None:
    assert champion_of(model.uri, model.name) is None
    assert model.promote(1) is None
    assert model.tags(1)["gate"].startswith("pass against nobody")
    assert model.promote(2) == 1
    asked = "margins: acceptance 0.02, speed None; error rate 0.025"
    assert model.tags(2)["gate"] == f"pass against 1; {asked}"
    now = champion_of(model.uri, model.name)
    assert now is not None and now.number == 2
    kept = model.client.download_artifacts(now.run_id, "gate/gate-against-1.json", str(model.folder))
    assert json.loads(Path(kept).read_text())["candidate"] == {"version": 2}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"verdict": "fail"}, "only what passes the gate"),
        ({"verdict": "not_enough_evidence"}, "only what passes the gate"),
        ({"candidate": {"version": 9}}, "is about .* version 9"),
        ({"model": "other"}, "is about other version"),
        ({"baseline": None}, "compares with version none, but the champion .* is 1"),
        ({"baseline": {"version": 9}}, "compares with version 9, but the champion .* is 1"),
        ({"baseline": {"version": None}}, "compares with version of no registry"),
        ({"candidate": None}, "is no gate.json"),
        ({"baseline": 1}, "is no gate.json"),
        ({"gate": {}}, "is no gate.json"),
    ],
)
def test_only_a_pass_against_the_present_champion_moves_it(
    model: Model, changes: dict[str, Any], match: str
) -> None:
    model.promote(1)
    with pytest.raises(BadData, match=match):
        promote(resolve(model.uri, model.name, "2"), model.gate(2, 1, **changes))
    assert model.champion == 1 and "gate" not in model.tags(2)


def test_results_of_no_registry_are_no_champion(model: Model) -> None:
    gate = model.gate(1, None, baseline={"version": None})
    with pytest.raises(BadData, match=r"of no registry, but the champion .* is none"):
        promote(resolve(model.uri, model.name, "1"), gate)
    assert champion_of(model.uri, model.name) is None


def test_a_champion_that_changed_meanwhile_stays_and_nothing_is_said_of_the_other(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.promote(1)
    upload = MlflowClient.log_artifact

    def overtaken(client: MlflowClient, *arguments: Any) -> None:
        upload(client, *arguments)
        client.set_registered_model_alias(model.name, "champion", "3")

    monkeypatch.setattr(MlflowClient, "log_artifact", overtaken)
    with pytest.raises(Incomplete, match="version 3 meanwhile"):
        model.promote(2)
    assert model.champion == 3 and not model.tags(2)
    with registry(model.uri) as client, pytest.raises(Incomplete, match="version 3 meanwhile"):
        move_champion(client, model.name, None, 1)
    assert model.rollback() == (3, 1)  # who came by the alias alone is in the history all the same


# ── back ──────────────────────────────────────────────────────────────────────────────────────────


def test_back_through_all_that_were_champion(model: Model) -> None:
    with pytest.raises(BadData, match="no champion before to go back to"):
        model.rollback()
    for number in (1, 2, 3, 2):
        model.promote(number)
    steps = []
    for _ in range(3):
        said = CliRunner().invoke(app, ["rollback", "--model", model.name, "--tracking-uri", model.uri])
        steps.append(said.stdout.strip())
    assert steps == [f"champion: version {old} → version {new}" for old, new in ((2, 3), (3, 2), (2, 1))]
    said = CliRunner().invoke(app, ["rollback", "--model", model.name, "--tracking-uri", model.uri])
    assert said.exit_code == 3 and model.champion == 1


def test_what_was_rolled_back_from_comes_back_only_if_asked_for(model: Model) -> None:
    for number in (1, 2):
        model.promote(number)
    model.rollback()
    assert model.tags(2)["rolled_back"] == "to version 1"
    with pytest.raises(BadData, match="--again"):
        model.promote(2)
    assert model.champion == 1
    assert model.promote(2, again=True) == 1
    assert model.champion == 2 and "rolled_back" not in model.tags(2)
    model.promote(3)
    assert model.rollback() == (3, 2)
    assert "rolled_back" in model.tags(3) and "rolled_back" not in model.tags(2)


def test_a_champion_that_is_promoted_stays_as_it_is(model: Model) -> None:
    for number in (1, 2, 2, 2):
        model.promote(number)
    assert model.promote(2) == 2
    assert model.rollback() == (2, 1)
    with pytest.raises(BadData, match="no champion before"):
        model.rollback()


def test_back_to_a_version_is_said_once_or_twice(model: Model) -> None:
    for number in (1, 2, 3):
        model.promote(number)
    assert model.rollback(to=1) == (3, 1)
    assert model.rollback(to=1) == (1, 1)
    assert {number for number in (1, 2, 3) if "rolled_back" in model.tags(number)} == {2, 3}
    with pytest.raises(BadData, match=r"no champion 2 to go back to: its champions were, in order, \[1\]"):
        model.rollback(to=2)


# ── lost ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_deleted_champion_lets_nobody_in_unopposed(model: Model) -> None:
    for number in (1, 2):
        model.promote(number)
    model.client.delete_model_version(model.name, "2")
    assert model.champion is None
    with pytest.raises(BadData, match="budgetdraft rollback"):
        champion_of(model.uri, model.name)
    with pytest.raises(BadData, match="version 2 or its alias was deleted"):
        promote(resolve(model.uri, model.name, "3"), model.gate(3, None))
    assert model.rollback() == (None, 1)
    assert model.promote(3) == 1
    assert model.rollback() == (3, 1)


def test_an_alias_that_was_deleted_is_set_again(model: Model) -> None:
    for number in (1, 2):
        model.promote(number)
    model.client.delete_registered_model_alias(model.name, "champion")
    assert model.rollback() == (None, 2)
    assert "rolled_back" not in model.tags(2)
    assert model.rollback() == (2, 1)


def test_without_any_champion_left_one_begins_anew(model: Model) -> None:
    model.promote(1)
    model.client.delete_model_version(model.name, "1")
    with pytest.raises(BadData, match="Without its tag 'champions' the model is as if"):
        model.rollback()
    model.client.delete_registered_model_tag(model.name, "champions")
    assert model.promote(2) is None


# ── cut off ───────────────────────────────────────────────────────────────────────────────────────

WRITES = ["set_registered_model_alias", "set_registered_model_tag", "set_model_version_tag"]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", WRITES)
def test_a_rollback_that_was_cut_off_goes_back_once(
    model: Model, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    """Repeated as its error says, wherever it was cut off."""
    for number in (1, 2, 3):
        model.promote(number)
    with cut_off(monkeypatch, method, after), pytest.raises(Incomplete, match="rollback --to 2"):
        model.rollback()
    model.rollback(to=2)
    assert model.champion == 2 and "rolled_back" in model.tags(3)
    assert model.rollback() == (2, 1)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", [*WRITES, "log_artifact"])
def test_a_promotion_that_was_cut_off_is_repeated(
    model: Model, monkeypatch: pytest.MonkeyPatch, method: str, after: bool
) -> None:
    for number in (1, 2):
        model.promote(number)
    with cut_off(monkeypatch, method, after), pytest.raises(Incomplete, match="gone"):
        model.promote(1)
    model.promote(1)
    assert [model.rollback(), model.rollback()] == [(1, 2), (2, 1)]
