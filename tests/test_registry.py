"""The model registry on a real MLflow: registered once, found again, fetched whole, made champion."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from jobs import register as registering
from jobs.cli import app
from jobs.pipeline import run_pipeline
from jobs.registry import (
    Version,
    champion_of,
    evidence_of,
    move_champion,
    promote,
    pull,
    registry,
    resolve,
    rollback,
)
from jobs.submit import JOB_CONFIG
from pipeline.errors import BadData, Incomplete
from pipeline.evidence import read_evidence
from tests.mlflow_server import MlflowServer, Proxy, free_port
from tests.registered import MODEL, Done, registered_config
from tests.test_tracking_server import planted
from tests.toys import artifact, toy_config


@pytest.fixture(scope="module")
def first(corpus: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Not to be changed."""
    storage = Path(shutil.copytree(finished, tmp_path_factory.mktemp("registered") / "runs"))
    config = registered_config(corpus, storage)
    run_pipeline(config)
    return Done(config, storage, f"sqlite:///{storage}/mlflow.db")


@pytest.fixture
def done(first: Done, tmp_path: Path) -> Iterator[Done]:
    """The same store, without what a test has added to it; the first version stays."""
    before, runs = set(first.versions()), set(first.pipeline_runs())
    yield first
    client = first.mlflow()
    if "champion" in client.get_registered_model(MODEL).aliases:
        client.delete_registered_model_alias(MODEL, "champion")
    for number in set(first.versions()) - before:
        client.delete_model_version(MODEL, str(number))
    for run in set(first.pipeline_runs()) - runs:
        client.delete_run(run)
    for key in ("champion_before", "gate"):
        client.delete_model_version_tag(MODEL, "1", key)


# ── what a version has ────────────────────────────────────────────────────────────────────────────


def test_tags_say_what_the_rows_say(first: Done) -> None:
    version = resolve(first.uri, MODEL, "1")
    summary = json.loads((artifact(first.storage, "report") / "summary.json").read_text())
    assert version.tags["drafter"] == "multi_view" and version.tags["config"] == summary["config"]
    rows = [
        json.loads(line)
        for file in (artifact(first.storage, "sweep") / "rows").glob("replay-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    for budget in (16, 32, "full"):
        here = [
            row for row in rows if (row["drafter"], row["budget"], row["control"], row["gamma"])
            == ("multi_view", budget, None, 4)
        ]  # fmt: skip
        share = sum(row["num_accepted"] for row in here) / sum(row["num_proposed"] for row in here)
        assert float(version.tags[f"acceptance.tales.64.{budget}"]) == pytest.approx(share, abs=5e-5)
    assert version.tags["acceptance_at"] == "chunk_topk, γ = 4, greedy"
    assert version.tags["budgets"] == "16, 32, full"
    evidence = read_evidence(artifact(first.storage, "report"))
    assert evidence_of(version) == evidence
    for name in ("target", "prompts", "hardware"):
        assert version.tags[name] == getattr(evidence, name)
    made = json.loads((artifact(first.storage, "drafter-multi_view") / "manifest.json").read_text())
    assert version.tags["git_commit"].startswith(made["provenance"]["git_sha"] or "unknown")


ELSEWHERE = """
import sys
import torch
for name in ("pipeline", "jobs", "kernels"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("The old miller said nothing.", return_tensors="pt")
with torch.no_grad():
    print(tokens["input_ids"].tolist(), float(model(**tokens).logits.double().abs().sum()))
"""


def test_pull_gives_a_folder_that_transformers_loads_alone(
    first: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command; with the card's own lines as well."""
    done = CliRunner().invoke(
        app, ["pull", "1", str(tmp_path / "out"), "--model", MODEL, "--tracking-uri", first.uri]
    )
    assert done.exit_code == 0, done.output
    folder = Path(done.stdout.splitlines()[-1])
    assert folder == tmp_path / "out"
    trained = artifact(first.storage, "drafter-multi_view") / "model"
    assert {file.name for file in folder.iterdir()} == {file.name for file in trained.iterdir()}
    ours, own = load_file(folder / "model.safetensors"), load_file(trained / "model.safetensors")
    assert ours.keys() == own.keys() and all(torch.equal(ours[name], own[name]) for name in own)

    target = artifact(first.storage, "pretrain-target") / "model"
    card = (folder / "README.md").read_text()
    card = card.replace('"TARGET"', repr(str(target))).replace('"FOLDER"', repr(str(folder)))
    theirs, with_ours = (part.split("```")[0] for part in card.split("```python\n")[1:])
    script = tmp_path / "alone.py"
    script.write_text(ELSEWHERE + theirs)
    alone = subprocess.run(
        [sys.executable, str(script), str(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert alone.returncode == 0, alone.stderr
    known, continued = alone.stdout.split("\n", 1)
    tokens = AutoTokenizer.from_pretrained(trained)("The old miller said nothing.", return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(trained)(**tokens).logits
    listed, _, value = known.rpartition(" ")
    assert json.loads(listed) == tokens["input_ids"].tolist()
    assert float(value) == pytest.approx(float(logits.double().abs().sum()), rel=1e-6)
    # Greedy speculation gives the target's own text, by whatever engine and behind whatever view.
    exec(compile(with_ours, "card", "exec"), {})
    assert continued.partition("A prompt")[2].strip() == capsys.readouterr().out.strip() != ""


def test_the_card_is_what_the_hub_reads_and_has_every_figure(first: Done, tmp_path: Path) -> None:
    card = (pull(resolve(first.uri, MODEL, "1"), tmp_path / "out") / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    summary = json.loads((artifact(first.storage, "report") / "summary.json").read_text())
    for cell in summary["acceptance"]:
        if (cell["drafter"], cell["gamma"]) == ("multi_view", 4) and cell["control"] != "no_prefix":
            figure = f"{100 * cell['mean']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
            beginning = f"| tales | 64 | chunk_topk | greedy | {cell['budget']} |"
            (line,) = (line for line in body.splitlines() if line.startswith(beginning))
            columns = [part.strip() for part in line.split("|")]
            assert columns[7 if cell["control"] else 6] == figure
    description = first.mlflow().get_model_version(MODEL, "1").description
    assert description == body[body.index("# ") :] and len(description) <= 5000


# ── once, and found again ─────────────────────────────────────────────────────────────────────────


def test_a_rerun_registers_nothing_new_and_leads_to_the_version(
    done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = {"metadata": {"job_submission_id": "raysubmit_AbC123", "job_name": "x"}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(metadata))
    run_pipeline(done.config)
    assert done.versions() == [1]
    newest, oldest = done.pipeline_runs()
    found = [resolve(done.uri, None, reference) for reference in ("1", newest, oldest, "raysubmit_AbC123")]
    assert all(version == found[0] for version in found)
    assert found[0].run_id == oldest


def test_two_that_register_at_once_make_one_version(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, both = registering.upload, threading.Barrier(2, timeout=60)

    def together(*arguments: Any) -> str:
        both.wait()  # neither has found a version
        return upload(*arguments)

    monkeypatch.setattr(registering, "upload", together)
    made: list[Version] = []
    threads = [threading.Thread(target=lambda: made.append(done.another())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and made[0] == made[1]
    assert len(done.versions()) == 2


@pytest.mark.parametrize("reference", ["champion", "7", "raysubmit_other", "0" * 32, "a'b", "../x"])
def test_what_is_not_there(first: Done, reference: str) -> None:
    with pytest.raises(BadData, match=r"there are versions \[1\], aliases none"):
        resolve(first.uri, MODEL, reference)


def test_no_such_model_and_no_such_store(first: Done, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=f"no model 'other'; it has {MODEL}"):
        resolve(first.uri, "other", "1")
    with pytest.raises(Incomplete, match="no such file"):
        resolve(f"sqlite:///{tmp_path}/none.db", MODEL, "1")
    with pytest.raises(Incomplete, match="no server answers") as error:
        resolve(f"http://ann:pa55word@127.0.0.1:{free_port()}", MODEL, "1")
    assert "pa55word" not in str(error.value)
    assert not list(tmp_path.iterdir())


# ── fetched whole or not at all ───────────────────────────────────────────────────────────────────


def test_a_folder_that_holds_something_is_left_alone(first: Done, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(BadData, match="is not empty"):
            pull(resolve(first.uri, MODEL, "1"), place)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    assert (pull(resolve(first.uri, MODEL, "1"), tmp_path / "empty") / "config.json").exists()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("name", ["hf_model/model.safetensors", "evidence/checksums.json"])
def test_what_is_damaged_in_the_store_is_not_fetched(
    first: Done, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    version = resolve(first.uri, MODEL, "1")
    (stored,) = (first.storage / "mlartifacts").glob(f"**/{version.run_id}/**/{name}")
    whole = stored.read_bytes()
    damage(stored)
    try:
        with pytest.raises((BadData, Incomplete), match=Path(name).name):
            pull(version, tmp_path / "out")
    finally:
        stored.write_bytes(whole)
    assert not list(tmp_path.iterdir())


# ── the champion ──────────────────────────────────────────────────────────────────────────────────


def gate(folder: Path, candidate: int, baseline: int | None, /, **changes: Any) -> Path:
    side = None if baseline is None else {"version": baseline}
    said = {"verdict": "pass", "model": MODEL, "candidate": {"version": candidate}, "baseline": side}
    (folder / "gate.json").write_text(json.dumps(said | changes))
    return folder / "gate.json"


def test_promoted_step_by_step_and_back(done: Done, tmp_path: Path) -> None:
    one, two = resolve(done.uri, MODEL, "1"), done.another()
    assert champion_of(done.uri, MODEL) is None
    with pytest.raises(BadData, match="has no champion"):
        rollback(done.uri, MODEL)
    assert promote(one, gate(tmp_path, 1, None)) is None
    with pytest.raises(BadData, match="first champion"):
        rollback(done.uri)
    assert promote(two, gate(tmp_path, two.number, 1)) == 1
    now = resolve(done.uri, MODEL, "champion")
    assert (now.number, now.tags["champion_before"], now.tags["gate"]) == (two.number, "1", "pass against 1")
    assert pull(now, tmp_path / "out").is_dir()
    assert promote(one, gate(tmp_path, 1, two.number)) == two.number
    # Back through all that were champion, and no further.
    assert rollback(done.uri) == (1, two.number)
    said = CliRunner().invoke(app, ["rollback", "--tracking-uri", done.uri])
    assert said.stdout == f"champion: version {two.number} → version 1\n", said.output
    assert CliRunner().invoke(app, ["rollback", "--tracking-uri", done.uri]).exit_code == 3
    found = champion_of(done.uri)
    assert found is not None and found.number == 1


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
    ],
)
def test_only_a_pass_against_the_present_champion_moves_it(
    done: Done, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    promote(resolve(done.uri, MODEL, "1"), gate(tmp_path, 1, None))
    two = done.another()
    with pytest.raises(BadData, match=match):
        promote(two, gate(tmp_path, two.number, 1, **changes))
    assert resolve(done.uri, MODEL, "champion").number == 1


def test_results_of_no_registry_are_no_champion(done: Done, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"of no registry, but the champion .* is none"):
        promote(resolve(done.uri, MODEL, "1"), gate(tmp_path, 1, None, baseline={"version": None}))
    assert champion_of(done.uri, MODEL) is None


def test_a_champion_that_changed_meanwhile_stays(done: Done, tmp_path: Path) -> None:
    two = done.another()
    promote(two, gate(tmp_path, two.number, None))
    with registry(done.uri) as client, pytest.raises(Incomplete, match=f"version {two.number} meanwhile"):
        move_champion(client, MODEL, None, 1)
    assert resolve(done.uri, MODEL, "champion").number == two.number


# ── a server that does not answer, and secrets ────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_out_of_reach_is_incomplete_and_a_rerun_registers_once(
    corpus: Path, storage: Path, server: MlflowServer, tmp_path: Path
) -> None:
    """The request is refused; then it is done and the answer is lost; then all is well, twice."""
    proxy = Proxy(server.port)
    uri = proxy.uri.replace("//", "//ann:pa55word@")
    config = registered_config(corpus, storage, uri=uri)
    try:
        for action in ("refuse", "lose"):
            proxy.behave = lambda method, path, action=action: (  # type: ignore[misc]
                action if path.endswith("/model-versions/create") else "pass"
            )
            with pytest.raises(Incomplete, match="MLflow at ") as error:
                run_pipeline(config)
            assert "pa55word" not in str(error.value)
        proxy.behave = lambda method, path: "pass"
        run_pipeline(config)
        version = resolve(uri, None, "1")
        with pytest.raises(BadData, match=r"versions \[1\]"):
            resolve(uri, None, "2")
        fetched = pull(version, tmp_path / "out")
    finally:
        proxy.stop()
    trained = artifact(storage, "drafter-multi_view") / "model" / "model.safetensors"
    assert (fetched / "model.safetensors").read_bytes() == trained.read_bytes()
    assert evidence_of(Version(server.uri, *list(vars(version).values())[1:])).drafter == "multi_view"
    assert not planted(storage, server.folder, fetched.parent)


# ── the config ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tracking": {"enabled": False}}, "registry needs MLflow"),
        ({"registry": {"model": MODEL, "drafter": "third"}}, "'third' is not among the drafters"),
        ({"registry": {"model": "a/b"}}, "registry.model"),
        ({"registry": {}}, "registry.model"),
    ],
)
def test_a_config_that_cannot_register(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    good = {"tracking": {"enabled": True}, "registry": {"model": MODEL}}
    toy_config(corpus, tmp_path, lambda values: values.update(good))
    with pytest.raises(ValidationError, match=match):
        toy_config(corpus, tmp_path, lambda values: values.update(good | changes))


def test_a_drafter_that_is_not_evaluated_cannot_be_registered(corpus: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["sweep"]["drafters"] = ["multi_view"]
        values |= {"tracking": {}, "registry": {"model": MODEL, "drafter": "full_only"}}

    with pytest.raises(ValidationError, match=r"evaluated \['multi_view'\]"):
        toy_config(corpus, tmp_path, change)
