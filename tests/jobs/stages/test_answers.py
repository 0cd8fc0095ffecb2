"""A pipeline whose training is partly on the target's own answers: from the question to the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from benchmarks.real_study.answers import collect
from jobs.executors.choose import NoExecutor
from jobs.plan.facts import known
from jobs.stages import pipeline
from jobs.stages.pipeline import run_pipeline
from pipeline.config.files import ConfigError
from pipeline.config.schema import Config
from pipeline.errors import BadData, Incomplete
from pipeline.store.files import read_rows
from pipeline.store.layout import MANIFEST
from pipeline.store.rows import Prompt, PromptRow
from tests.helpers.fake_server import Fake, greedy_texts, serving
from tests.helpers.toys import artifact, toy_config

ASK = "Read this.\n{text}\nSay more."


def asking(values: dict[str, Any]) -> None:
    (tales,) = values["data"]["sources"]
    asked = {**tales, "name": "asked", "ask": ASK, "training_prompts": {48: 6, 60: 4}}
    values["data"]["sources"] = [tales, asked]
    values["labels"] |= {"answers": {"per_prompt": 2, "temperature": 1.0}, "sequences_per_shard": 8}
    for role in ("target", "drafter"):
        values[role]["pretrain"] |= {"steps": 3}
    values["sweep"] |= {"mode": "replay"}


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    return toy_config(corpus, tmp_path / "runs", asking)


def test_from_the_question_to_the_report(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Path(config.storage)
    _, before = known(config)
    report = run_pipeline(config)
    prepared, taught = artifact(storage, "prepare"), artifact(storage, "teach")
    asked = [
        prompt for file in sorted((prepared / "asked").glob("*.jsonl")) for prompt in read_rows(file, Prompt)
    ]
    assert sorted({len(prompt.tokens) for prompt in asked}) == [48, 60] and len(asked) == 10
    tested = [
        prompt
        for file in (prepared / "prompts").glob("test-asked-*.jsonl")
        for prompt in read_rows(file, Prompt)
    ]
    assert tested and not {p.document_id for p in tested} & {p.document_id for p in asked}
    shards = sorted((taught / "labels").glob("answers-*.tokens.npy"))
    counts = json.loads((taught / MANIFEST).read_text())["counts"]
    assert len(shards) == 3 and counts["answers"] == sum(len(np.load(file)) for file in shards) <= 20
    assert counts["sequences"] > 0 and counts["answer_tokens"] > 0
    _, facts = known(config)
    assert facts.answers == 20 and facts.how == "exact" and before.answers >= 20
    rows = [
        row for file in artifact(storage, "sweep").glob("rows/*.jsonl") for row in read_rows(file, PromptRow)
    ]
    assert {row.cell.dataset for row in rows} == {"tales", "asked"}
    assert report.exists()

    monkeypatch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
    run_pipeline(config)  # finds everything


def greedily(values: dict[str, Any]) -> None:
    asking(values)
    values["labels"] = {"sequences_per_shard": 4, "answers": {}}


@pytest.mark.parametrize(
    "executor", ["inline", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_a_server_of_the_target_may_write_the_answers(
    corpus: Path, tmp_path: Path, executor: str, request: pytest.FixtureRequest
) -> None:
    """Down at first; then what the target alone would have written, with the same labels."""
    if executor == "ray":
        request.getfixturevalue("on_local_ray")
    storage = tmp_path / "runs"
    run_pipeline(toy_config(corpus, storage, greedily), "teach")
    alone = artifact(storage, "teach")
    target = artifact(storage, "pretrain-target") / "model"

    def by_server(url: str, **more: Any) -> Config:
        def change(values: dict[str, Any]) -> None:
            greedily(values)
            values["labels"]["server"] = {"url": url, **more}
            values["run"]["executor"] = executor

        return toy_config(corpus, storage, change)

    eos = GenerationConfig.from_pretrained(target).eos_token_id
    most = toy_config(corpus, storage, greedily).train.learned_tokens
    fake = Fake(greedy_texts(target, most), eos=frozenset([eos] if isinstance(eos, int) else eos or []))
    with serving(fake):
        pass
    with pytest.raises(Incomplete, match=r"labels.server|does not answer"):
        run_pipeline(by_server(fake.url), "teach")
    with serving(fake) as server:
        # Where it is, and how it is asked, changes nothing that is kept.
        run_pipeline(by_server(server.url, requests_at_once=2), "teach")
        (folder,) = set(storage.glob("teach-*")) - {alone}
        told = len(server.asked)
        run_pipeline(by_server("http://elsewhere", model="other", timeout_s=5), "teach")
    assert told == len(server.asked) == 10
    counts = json.loads((folder / MANIFEST).read_text())["counts"]
    assert (counts["served"], counts["refused"]) == (10, 0)
    files = {file.relative_to(alone) for file in alone.rglob("*.*") if file.name != MANIFEST}
    theirs = {file.relative_to(folder) for file in folder.rglob("*.*") if file.name != MANIFEST}
    shares = {file for file in theirs if ".agreement." in file.name}
    assert theirs - shares == files and len(shares) == 3  # a shard of answers
    for file in files:
        assert (alone / file).read_bytes() == (folder / file).read_bytes(), file


def test_the_answers_of_a_finished_run_may_be_taken_from_a_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "runs"
    run_pipeline(toy_config(corpus, storage, asking), "teach")
    alone = artifact(storage, "teach")
    assert collect(alone, tmp_path / "one" / "answers.xz", "toy") == 10
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def from_file(place: str) -> Config:
        def change(values: dict[str, Any]) -> None:
            asking(values)
            values["labels"]["answers"]["written"] = str(tmp_path / place / "answers.xz")

        return toy_config(corpus, storage, change)

    run_pipeline(from_file("one"), "teach")
    (folder,) = set(storage.glob("teach-*")) - {alone}
    counts = json.loads((folder / MANIFEST).read_text())["counts"]
    assert (counts["served"], counts["refused"], counts["missing"]) == (10, 0, 0)
    for file in alone.rglob("*.*"):
        if file.name != MANIFEST:
            assert file.read_bytes() == (folder / file.relative_to(alone)).read_bytes(), file
    monkeypatch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
    run_pipeline(from_file("two"), "teach")  # the same file elsewhere: finds everything
    with pytest.raises(BadData, match=r"labels.answers.written: .*three/answers.xz: No such file"):
        run_pipeline(from_file("three"), "teach")


def test_training_may_be_on_answers_alone(corpus: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        asking(values)
        values["data"]["sources"] = values["data"]["sources"][1:]
        values["target"]["pretrain"]["steps"] = 0
        values["drafter"] = {"kind": "first_layers", "layers": [1]}

    config = toy_config(corpus, tmp_path / "runs", change)
    run_pipeline(config, "train")
    labels = artifact(Path(config.storage), "teach") / "labels"
    assert {file.name.split("-")[0] for file in labels.glob("*.npy")} == {"answers"}


def test_a_training_prompt_must_leave_room_for_its_answer(corpus: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        asking(values)
        values["data"]["sources"][1]["training_prompts"] = {90: 4}

    with pytest.raises((ValueError, ConfigError), match=r"sources.1.training_prompts: 90 tokens"):
        toy_config(corpus, tmp_path / "runs", change)
