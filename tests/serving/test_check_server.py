"""A trained drafter, exported, served by vLLM over HTTP, and checked: what was promised is what is served."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.helpers.clock import wait_for
from tests.helpers.mlflow_server import free_port
from tests.helpers.toys import artifact, toy_config
from tests.helpers.vllm import NEEDS_VLLM, PYTHON

pytestmark = NEEDS_VLLM
GAMMA = 2


def for_vllm(values: dict[str, Any]) -> None:
    """Models of a shape that vLLM's attention takes, and texts of some length."""
    for role in ("target", "drafter"):
        values[role] |= {"hidden": 64, "heads": 2, "kv_heads": 1}
    values["data"] |= {"max_new_tokens": 32}
    values["sweep"] |= {"mode": "replay", "gammas": [GAMMA]}
    del values["sweep"]["measure"]


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    storage = tmp_path_factory.mktemp("vllm") / "runs"
    run_pipeline(toy_config(corpus, storage, for_vllm))
    return open_results(artifact(storage, "report"))


@contextmanager
def vllm(target: Path, log: Path, flags: str, *more: str) -> Iterator[str]:
    """The address of a server with these flags of `speculation`, until the context is left."""
    port = free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), *more]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "1", "--no-enable-prefix-caching"]
    command += ["--speculative-config", flags.split("'")[1]] if flags else []
    quiet = {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **quiet})
    url = f"http://127.0.0.1:{port}"

    def up() -> bool:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(up, "vLLM answered", 300, process, lambda: log.read_text()[-3000:])
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("told_by", ["request", "metrics"])
def test_a_served_drafter_passes_its_check(results: Results, tmp_path: Path, told_by: str) -> None:
    storage = results.report.path.parent
    export_for(results.drafter.path / "model", tmp_path / "served", "vllm")
    flags = speculation("vllm", "lm", GAMMA, str(tmp_path / "served"))
    told = ["--per-request-spec-decode-metrics", "summary"] if told_by == "request" else []
    target = artifact(storage, "pretrain-target") / "model"
    with vllm(target, tmp_path / "log", flags, *told) as url:
        check = check_server(Server(url), None, results, FULL, GAMMA, 8, 0.02, tmp_path / "check")
    assert check.verdict == "pass", check.reasons
    assert {prompt.told_by for prompt in check.prompts} == {told_by}
    assert all(prompt.parts_at is None for prompt in check.prompts)
    # What an engine accepts beyond the end of a text counts there, and nothing else differs.
    for prompt in check.prompts:
        assert prompt.rounds == prompt.replayed_rounds
        assert 0 <= sum(prompt.accepted_at) - sum(prompt.replayed_at) <= GAMMA
