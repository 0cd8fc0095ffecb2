"""Rounds of serve, learn, gate on a toy: what is made, what is cached, what is resumed, who stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.executors.choose import NoExecutor
from jobs.records.record import RECORDS, RunStatus
from jobs.stages import pipeline
from jobs.stages.improve import Steps
from jobs.stages.pipeline import run_pipeline
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.metrics import Counts
from pipeline.store.artifacts import Artifact
from pipeline.store.files import read_all, read_rows
from pipeline.store.layout import MANIFEST
from pipeline.store.rows import ImprovedRound, PromptRow, ServedText
from tests.helpers.toys import toy_config

pytestmark = pytest.mark.slow

SERVED, JUDGED, GAMMA = 8, 6, 3
Change = Callable[[dict[str, Any]], object]


def improving(corpus: Path, storage: Path, change: Change | None = None) -> Config:
    def all_changes(values: dict[str, Any]) -> None:
        values["data"]["sources"][0]["validation_fraction"] = 0.3
        values["data"] |= {"validation_prompts": JUDGED, "max_sequences": 16}
        values["labels"]["top_k"] = 8
        values["train"]["variants"] = values["train"]["variants"][1:]
        for role, steps in (("target", 30), ("drafter", 5)):
            values[role]["pretrain"]["steps"] = steps
        values["improve"] = {
            "prompts": SERVED, "steps": 6, "kl_steps": 3, "gamma": GAMMA,
            "gate": {"gammas": [2, 4], "least_documents": 5, "margins": {"acceptance": 0.5}},
        }  # fmt: skip
        if change:
            change(values)

    return toy_config(corpus, storage, all_changes)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with all that comes before the first round."""
    storage: Path = tmp_path_factory.mktemp("trained") / "runs"
    run_pipeline(improving(corpus, storage), "train")
    return storage


@pytest.fixture(scope="module")
def improved(corpus: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two rounds."""
    storage = Path(shutil.copytree(trained, tmp_path_factory.mktemp("improved") / "runs"))
    run_pipeline(improving(corpus, storage), "improve")
    return storage


@pytest.fixture
def fresh(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def told(storage: Path) -> list[ImprovedRound]:
    """By the improving that went through most rounds."""
    found = [read_rows(file, ImprovedRound) for file in storage.glob("improve-*/rounds.jsonl")]
    return max(found, key=len)


def inputs(folder: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["inputs"]
    return made


def contents(storage: Path) -> dict[str, bytes]:
    """All that is computed: no manifests, which tell the time, no records, no speeds."""
    files = [
        file
        for pattern in ("served-*", "improved-*/model", "evidence-*", "gate-*", "improve-*")
        for folder in storage.glob(pattern)
        for file in folder.rglob("*")
        if file.is_file() and file.name != MANIFEST
    ]
    return {str(file.relative_to(storage)): file.read_bytes() for file in files}


def test_a_round_serves_what_stands_learns_from_it_and_is_judged(improved: Path) -> None:
    first, second = told(improved)
    assert (first.number, second.number) == (0, 1)
    assert first.current.startswith("drafter-multi_view-")
    assert first.stands == second.current == first.candidate != second.candidate  # half of all is tolerated
    for one in (first, second):
        candidate = inputs(improved / one.candidate)
        assert candidate["start"] == one.current.rpartition("-")[2]
        served = improved / f"served-multi_view-{candidate['served']}"
        assert inputs(served)["drafter"] == candidate["start"]
        rows = read_all(served / "labels", ServedText)
        assert (one.texts, one.decoding_rounds) == (len(rows), sum(len(row.rounds) for row in rows))
        assert {row.view.budget for row in rows} == {16, 32} and {row.gamma for row in rows} == {GAMMA}
        rounds = [logged for row in rows for logged in row.rounds]
        assert one.proposed == sum(len(logged.proposals) for logged in rounds)
        assert one.accepted == sum(logged.accepted for logged in rounds) > 0
        start, end = (
            load_file(improved / name / "model/model.safetensors") for name in (one.current, one.candidate)
        )
        assert all(not torch.equal(start[name], end[name]) for name in start)
        card = (improved / one.candidate / "model/README.md").read_text()
        assert "KL for 3 steps, then reward-masked cross entropy" in card
    prompts = [
        {row.prompt_id for row in read_all(folder / "labels", ServedText)}
        for folder in improved.glob("served-*")
    ]
    assert len(prompts) == 2 and not prompts[0] & prompts[1]


def test_the_verdict_is_the_gates_on_validation_prompts_that_both_replayed(improved: Path) -> None:
    names = {inputs(folder)["drafter"]: folder for folder in improved.glob("evidence-*")}
    assert len(names) == 3  # what stands is not replayed again
    for one in told(improved):
        (gate,) = (
            folder
            for folder in improved.glob("gate-*")
            if json.loads((folder / "gate.json").read_text())["candidate"]["reference"] == one.candidate
        )
        decision = json.loads((gate / "gate.json").read_text())
        assert decision["verdict"] == one.verdict and decision["baseline"]["reference"] == one.current
        assert {path.name for path in gate.iterdir()} >= {"gate.json", "gate.md", "gate.png"}
        assert len(decision["cells"]) == 2 * 3  # γ × budgets
        for side in ("candidate", "baseline"):
            rows = read_all(names[decision[side]["reference"].rpartition("-")[2]] / "rows", PromptRow)
            assert {row.prompt_id for row in rows} and all("validation" in row.prompt_id for row in rows)
            for cell in decision["cells"]:
                key = cell["cell"]["view"]["budget"], cell["cell"]["gamma"]
                mine = [
                    row.counts
                    for row in rows
                    if (row.cell.budget, row.cell.gamma) == key and row.cell.control is None
                ]
                assert len(mine) == JUDGED
                assert cell[side] == pytest.approx(Counts.pooled(mine).acceptance)


def test_a_second_run_finds_everything_and_more_rounds_go_on(
    corpus: Path, improved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Path(shutil.copytree(improved, tmp_path / "runs"))
    before = contents(storage)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_executor", lambda config: NoExecutor())
        stands = run_pipeline(improving(corpus, storage), "improve")
    assert contents(storage) == before and stands == storage / told(storage)[-1].stands
    records = sorted((storage / RECORDS).glob("*/status.json"), key=lambda file: file.stat().st_mtime_ns)
    status = RunStatus.model_validate_json(records[-1].read_text())
    assert [stage.name for stage in status.stages] == ["prepare", "pretrain", "teach", "train", "improve"]
    assert (status.state, status.until, status.stages[-1].cached) == ("done", "improve", True)

    run_pipeline(improving(corpus, storage, lambda v: v["improve"].update(rounds=3)), "improve")
    after = contents(storage)
    assert before.items() < after.items()
    assert [one.number for one in told(storage)] == [0, 1, 2]
    assert told(storage)[:2] == told(improved)


class Killed(BaseException):
    """What ends a run from without."""


def test_killed_behind_every_step_it_goes_on_to_the_same_bytes(
    corpus: Path, improved: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def dying(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Steps, *arguments: Any) -> Any:
            made = step(self, *arguments)
            artifact: Artifact = made if isinstance(made, Artifact) else made[0]
            if artifact.path.name not in done:
                done.append(artifact.path.name)
                raise Killed(name)
            return made

        return run

    deaths = []
    with monkeypatch.context() as patch:
        for name in ("serve", "learn", "evidence", "gate"):
            patch.setattr(Steps, name, dying(name, getattr(Steps, name)))
        for _ in range(20):
            try:
                stands = run_pipeline(improving(corpus, fresh), "improve")
                break
            except Killed as death:
                deaths.append(str(death))
    assert deaths == ["serve", "learn", "evidence", "evidence", "gate", "serve", "learn", "evidence", "gate"]
    assert stands.name == told(improved)[-1].stands
    assert contents(fresh) == contents(improved)


def test_a_candidate_that_is_worse_is_not_taken(corpus: Path, fresh: Path) -> None:
    """The drafter begins as the whole target, whose proposals are all accepted, and is spoilt by training.
    The next round goes on from what stands, with other prompts."""

    def spoilt(values: dict[str, Any]) -> None:
        values["drafter"] = {"kind": "first_layers", "layers": [0, 1]}
        values["train"]["variants"][0] = {"name": "multi_view", "steps": 0, "sparse_weight": 0}
        values["improve"] |= {"rounds": 2, "learning_rate": 0.3, "kl_steps": 0}
        values["improve"]["gate"]["margins"]["acceptance"] = 0.01

    stands = run_pipeline(improving(corpus, fresh, spoilt), "improve")
    one, other = told(fresh)
    assert one.accepted == one.proposed > 0 and one.verdict == other.verdict == "fail"
    assert one.stands == one.current == other.current == other.stands == stands.name
    assert len({one.candidate, other.candidate, stands.name}) == 3


def test_layers_of_the_target_keep_what_lies_around_them(corpus: Path, fresh: Path) -> None:
    def layered(values: dict[str, Any]) -> None:
        values["drafter"] = {"kind": "first_layers", "layers": [1]}
        values["train"]["draft_vocabulary"] = 40
        values["improve"]["rounds"] = 1

    run_pipeline(improving(corpus, fresh, layered), "improve")
    (one,) = told(fresh)
    start, end = (fresh / name / "model" for name in (one.current, one.candidate))
    weights = [load_file(folder / "model.safetensors") for folder in (start, end)]
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    assert changed == {name for name in weights[0] if ".layers." in name}
    vocabulary = "draft_vocabulary.json"
    assert (start / vocabulary).read_bytes() == (end / vocabulary).read_bytes()
    tokens = set(json.loads((end / vocabulary).read_text())["tokens"])
    rows = [row for folder in fresh.glob("served-*") for row in read_all(folder / "labels", ServedText)]
    proposals = {token for row in rows for logged in row.rounds for token in logged.proposals}
    assert proposals <= tokens and len(tokens) == 40


def test_the_term_of_sampled_paths_is_no_part_of_improving(corpus: Path, fresh: Path) -> None:
    """Rounds that were served take its place; neither fingerprint nor card names it."""

    def with_paths(values: dict[str, Any]) -> None:
        values["train"]["variants"][0]["path"] = {"every": 2, "paths": 2, "length": 2}
        values["improve"] |= {"rounds": 1}

    run_pipeline(improving(corpus, fresh, with_paths), "improve")
    (candidate,) = fresh.glob("improved-*")
    (trained,) = (path for path in fresh.glob("drafter-*") if "path" in inputs(path)["variant"])
    assert "path" not in inputs(candidate)["variant"]
    assert "path" in (trained / "model" / "README.md").read_text()
    assert "path (" not in (candidate / "model" / "README.md").read_text()


def test_without_a_group_improve_nothing_is_run(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no group improve"):
        run_pipeline(toy_config(corpus, tmp_path / "runs"), "improve")
    assert not (tmp_path / "runs").exists()
