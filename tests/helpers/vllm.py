"""vLLM in an interpreter of its own: it serves prompts, and its counters are read.

`make setup-vllm` makes that interpreter, BUDGETDRAFT_VLLM names another.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.metrics import Round
from tests.helpers.clock import patience, wait_for
from tests.helpers.feature_heads import prompt
from tests.helpers.mlflow_server import free_port
from tests.helpers.paths import ROOT

PYTHON = Path(os.environ.get("BUDGETDRAFT_VLLM", ROOT / ".venv-vllm" / "bin" / "python"))
PROGRAM = ROOT / "tests" / "serving" / "vllm_run.py"
PROMPTS = [prompt(length, length) for length in (45, 60, 52)]
GAMMA, LIMIT = 3, 32

NEEDS_VLLM = [
    pytest.mark.long,
    pytest.mark.timeout(patience(900)),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: make setup-vllm"),
]


class Served(NamedTuple):
    """Texts, and what the engine counted over all of them."""

    tokens: list[list[int]]
    counters: dict[str, Any]

    @property
    def told(self) -> tuple[int, int, list[int]]:
        """Rounds, proposals, and acceptances by position."""
        names = ("drafts", "draft_tokens", "accepted_tokens_per_pos")
        rounds, proposed, accepted = (self.counters[f"vllm:spec_decode_num_{name}"] for name in names)
        return rounds, proposed, accepted


def serve(folder: Path, target: Path, speculative: dict[str, Any] | None, **engine: Any) -> Served:
    """The greedy texts of the prompts, without an end of theirs.

    Args:
        folder: where the request is written.
        engine: more of what vLLM's engine takes.
    """
    asked = {
        "target": str(target), "prompts": [tokens[0].tolist() for tokens in PROMPTS], "max_tokens": LIMIT,
        "speculative": speculative, "engine": engine,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(asked))
    command = [str(PYTHON), str(PROGRAM), str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return Served(**json.loads(lines[0].removeprefix("RESULT ")))


def for_vllm(values: dict[str, Any]) -> None:
    """Models of a toy config get a shape that vLLM's attention takes."""
    for role in ("target", "drafter"):
        values[role] |= {"hidden": 64, "heads": 2, "kv_heads": 1}


@contextmanager
def api_server(target: Path, log: Path, flags: str, *more: str, at_once: int = 1) -> Iterator[str]:
    """The address of `vllm serve` with these flags of `speculation`, until the context is left."""
    port = free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(target), *more]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", str(at_once), "--no-enable-prefix-caching"]
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


def longer(target: PreTrainedModel, tokens: Tensor) -> list[int]:
    """The target's greedy text, some rounds longer than what is served."""
    text = target.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=LIMIT + 2 * GAMMA + 2,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return list(text[0, tokens.shape[1] :].tolist())


def counted(rounds_of_texts: Sequence[Sequence[Round]]) -> tuple[int, int, list[int]]:
    """Rounds, proposals and acceptances by position, as an engine counts replayed rounds.

    A round that begins before the last token drafts γ, and all that it accepts counts, also beyond the end.
    """
    rounds, accepted = 0, [0] * GAMMA
    for of_text in rounds_of_texts:
        count = 1
        for one in of_text:
            if count >= LIMIT:
                break
            rounds += 1
            count += one.emitted
            for position in range(one.accepted):
                accepted[position] += 1
    return rounds, GAMMA * rounds, accepted
