"""The model registry on a real MLflow: registered once, found again, fetched whole, gated."""

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
from click.testing import Result
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from jobs.cli.main import app
from jobs.executors.ray_job import JOB_CONFIG
from jobs.registry import register as registering
from jobs.registry.served import attach
from jobs.registry.versions import Version, evidence_of, pull, resolve
from jobs.stages.pipeline import run_pipeline
from pipeline.errors import BadData, Incomplete
from pipeline.gate.evidence import read_evidence
from pipeline.intervals import Interval
from pipeline.serving.judged import ServerCheck
from tests.helpers.clock import patience
from tests.helpers.mlflow_server import free_port
from tests.helpers.paths import ROOT
from tests.helpers.registered import MODEL, Done, registered_config
from tests.helpers.toys import PROMPTS, artifact, toy_config

CONF = ROOT / "conf/gate.yaml"


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
    client.delete_registered_model_tag(MODEL, "champions")
    for key in ("rolled_back", "gate"):
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
            row["counts"] for row in rows
            if (row["cell"]["drafter"], row["cell"]["gamma"]) == ("multi_view", 4)
            and (row["cell"]["view"]["budget"], row["cell"]["view"]["control"]) == (budget, None)
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
        [sys.executable, str(script), str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patience(120),
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
    for row in summary["acceptance"]:
        cell, view, share = row["cell"], row["cell"]["view"], row["value"]
        if (cell["drafter"], cell["gamma"]) == ("multi_view", 4) and view["control"] != "no_prefix":
            figure = f"{100 * share['mean']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
            beginning = f"| tales | 64 | chunk_topk | greedy | {view['budget']} |"
            (line,) = (line for line in body.splitlines() if line.startswith(beginning))
            columns = [part.strip() for part in line.split("|")]
            assert columns[7 if view["control"] else 6] == figure
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
    upload, both = registering.upload, threading.Barrier(2, timeout=patience(60))

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


def test_what_was_never_registered_is_not_fetched(done: Done, tmp_path: Path) -> None:
    version = done.another()
    strange = tmp_path / "modeling_llama.py"
    strange.write_text("import os")
    done.mlflow().log_artifact(version.run_id, str(strange), "hf_model")
    with pytest.raises(BadData, match=r"hf_model/modeling_llama.py, which was not registered"):
        pull(version, tmp_path / "out")
    assert not (tmp_path / "out").exists() and evidence_of(version).drafter == "full_only"


# ── the gate on what is registered ────────────────────────────────────────────────────────────────


def gate(done: Done, folder: Path, *arguments: str) -> Result:
    """With a margin that the toy's few documents can pass."""
    command = ["gate", "--tracking-uri", done.uri, "--model", MODEL, "--output", str(folder / "gate")]
    wide = ["least_documents=5", "margins.acceptance=0.9", "bootstrap_samples=200"]
    return CliRunner().invoke(app, [*command, "--config", str(CONF), *arguments, *wide])


def champion(done: Done) -> str:
    return str(done.mlflow().get_model_version_by_alias(MODEL, "champion").version)


def test_a_schedule_neither_moves_the_champion_nor_undoes_a_rollback(done: Done, tmp_path: Path) -> None:
    two = str(done.another().number)
    first = gate(done, tmp_path, "--candidate", "1", "--promote")
    assert first.exit_code == 0 and "There is no champion yet" in first.stderr, first.output
    for reason in ("cells are above", "is the champion itself"):
        again = gate(done, tmp_path, "--candidate", two, "--promote")
        assert again.exit_code == 0 and reason in again.stderr, again.output
        assert champion(done) == two
    assert CliRunner().invoke(app, ["rollback", "--tracking-uri", done.uri]).exit_code == 0
    refused = gate(done, tmp_path, "--candidate", two, "--promote")
    assert refused.exit_code == 3 and "somebody rolled back" in refused.stderr and champion(done) == "1"
    assert json.loads((tmp_path / "gate" / "gate.json").read_text())["verdict"] == "pass"
    assert gate(done, tmp_path, "--candidate", two, "--promote", "--again").exit_code == 0
    assert champion(done) == two
    kept = done.mlflow().download_artifacts(resolve(done.uri, MODEL, two).run_id, "gate", str(tmp_path))
    decided = json.loads((Path(kept) / "gate-against-1.json").read_text())
    assert decided["gate"]["margins"]["acceptance"] == 0.9 and decided["cells"]


def test_a_champion_that_was_deleted_is_no_first_one(done: Done, tmp_path: Path) -> None:
    two = str(done.another().number)
    for number in ("1", two):
        assert gate(done, tmp_path, "--candidate", number, "--promote").exit_code == 0
    done.mlflow().delete_model_version(MODEL, two)
    refused = gate(done, tmp_path, "--candidate", "1")
    assert refused.exit_code == 3 and "budgetdraft rollback" in refused.stderr


def test_a_champion_that_is_evaluated_anew_is_promoted_against(
    done: Done, corpus: Path, tmp_path: Path
) -> None:
    """On other prompts, by the run that trains the candidate on from it."""
    assert gate(done, tmp_path, "--candidate", "1", "--promote").exit_code == 0
    folder = pull(resolve(done.uri, MODEL, "champion"), tmp_path / "champion")

    def change(values: dict[str, Any]) -> None:
        values |= {"tracking": {"experiment": "toy", "uri": done.uri}, "registry": {"model": MODEL}}
        target = artifact(done.storage, "pretrain-target") / "model"
        values["target"] = {"kind": "pretrained", "path": str(target)}
        values["drafter"] = {"kind": "pretrained", "path": str(folder)}
        values["data"] |= {"tokenizer": {"kind": "target"}, "prompts": PROMPTS - 2}
        values["train"] |= {"steps": 2}
        values["train"]["variants"] = [
            {"name": "before", "steps": 0, "sparse_weight": 0},
            {"name": "after", "sparse_weight": 0},
        ]
        values["sweep"].pop("measure")
        values["sweep"]["mode"] = "replay"

    report = run_pipeline(toy_config(corpus, tmp_path / "runs", change)).parent
    newest = str(max(done.versions()))
    other = gate(done, tmp_path, "--candidate", newest, "--promote")
    assert other.exit_code == 3 and "other prompts" in other.stderr, other.output
    refused = gate(done, tmp_path, "--candidate", newest, "--baseline", f"{report}:after", "--promote")
    assert refused.exit_code == 3 and "its weights are not those of" in refused.stderr
    assert champion(done) == "1"
    passed = gate(done, tmp_path, "--candidate", newest, "--baseline", f"{report}:before", "--promote")
    assert passed.exit_code == 0 and champion(done) == newest, passed.output
    said = json.loads((tmp_path / "gate" / "gate.json").read_text())["baseline"]
    assert (said["drafter"], said["version"]) == ("before", 1)


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


def test_pull_writes_for_an_engine(done: Done, tmp_path: Path) -> None:
    where, folder = ["--model", MODEL, "--tracking-uri", done.uri], tmp_path / "served"
    made = CliRunner().invoke(app, ["pull", "1", str(folder), "--for", "vllm", "--window", "32", *where])
    assert made.exit_code == 0, made.output
    assert json.loads((folder / "config.json").read_text())["sliding_window"] == 32
    assert f'"model": "{folder}"' in (folder / "README.md").read_text()
    alone = CliRunner().invoke(app, ["pull", "1", str(tmp_path / "other"), "--window", "32", *where])
    assert alone.exit_code == 2 and "name it with --for" in alone.output
    assert {path.name for path in tmp_path.iterdir()} == {"served"}


# ── what is added to a version ────────────────────────────────────────────────────────────────────


def test_a_check_of_a_server_is_kept_with_the_version(done: Done, tmp_path: Path) -> None:
    half, none = Interval(0.5, 0.4, 0.6), Interval(0.0, -0.01, 0.01)
    figures = {"served": half, "replayed": half, "difference": none, "tokens_per_s": 30.5, "speedup": None}
    check = ServerCheck.model_construct(verdict="pass", **figures)
    for name in (names := ("check.json", "check.md", "check.png")):
        (tmp_path / name).write_text(name)
    version, client = resolve(done.uri, MODEL, "1"), done.mlflow()
    place = attach(version, check, tmp_path)
    assert [f.path for f in client.list_artifacts(version.run_id, place)] == [f"{place}/{n}" for n in names]
    metrics = client.get_run(version.run_id).data.metrics.items()
    served = {name: value for name, value in metrics if name.startswith("served/")}
    told = {"acceptance": 0.5, "replayed_acceptance": 0.5, "difference": 0.0, "tokens_per_s": 30.5}
    assert served == {f"served/{name}": value for name, value in told.items()}
    assert resolve(done.uri, MODEL, "1").tags["served"] == "pass"
    client.delete_model_version_tag(MODEL, "1", "served")
