"""A trained drafter, exported, served by vLLM over HTTP, and checked: what was promised is what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.commands.check_server import check_server
from jobs.stages.pipeline import run_pipeline
from pipeline.axes import FULL
from pipeline.gate.evidence import Results, open_results
from pipeline.serving.client import Server
from pipeline.serving.export import export_for
from pipeline.serving.flags import speculation
from tests.helpers.toys import artifact, toy_config
from tests.helpers.vllm import NEEDS_VLLM, api_server, for_vllm

pytestmark = NEEDS_VLLM
GAMMA = 2


def replayed(values: dict[str, Any]) -> None:
    for_vllm(values)
    values["data"] |= {"max_new_tokens": 32}
    values["sweep"] |= {"mode": "replay", "gammas": [GAMMA]}
    del values["sweep"]["measure"]


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    storage = tmp_path_factory.mktemp("vllm") / "runs"
    run_pipeline(toy_config(corpus, storage, replayed))
    return open_results(artifact(storage, "report"))


@pytest.mark.parametrize("told_by", ["request", "metrics"])
def test_a_served_drafter_passes_its_check(results: Results, tmp_path: Path, told_by: str) -> None:
    storage = results.report.path.parent
    export_for(results.drafter.path / "model", tmp_path / "served", "vllm")
    flags = speculation("vllm", "lm", GAMMA, str(tmp_path / "served"))
    told = ["--per-request-spec-decode-metrics", "summary"] if told_by == "request" else []
    target = artifact(storage, "pretrain-target") / "model"
    with api_server(target, tmp_path / "log", flags, *told) as url:
        check = check_server(Server(url), None, results, FULL, GAMMA, 8, 0.02, tmp_path / "check")
    assert check.verdict == "pass", check.reasons
    assert {prompt.told_by for prompt in check.prompts} == {told_by}
    assert all(prompt.parts_at is None for prompt in check.prompts)
    # What an engine accepts beyond the end of a text counts there, and nothing else differs.
    for prompt in check.prompts:
        assert prompt.rounds == prompt.replayed_rounds
        assert 0 <= sum(prompt.accepted_at) - sum(prompt.replayed_at) <= GAMMA
