"""Heads that training made, served by vLLM: its text is the target's, and it counts what replay counts.

It needs an interpreter that has vLLM: `make setup-vllm` makes one, BUDGETDRAFT_VLLM names another.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode import replay
from pipeline.decode.chain_replay import tell_chains
from pipeline.decode.model import decode_model
from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model
from pipeline.models.export import export_model
from pipeline.models.heads.eagle import FeatureHead
from pipeline.serving.export import export_for
from tests.helpers.clock import patience
from tests.helpers.feature_heads import OPTIONS, prompt, trained_head
from tests.helpers.paths import ROOT
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer

PYTHON = Path(os.environ.get("BUDGETDRAFT_VLLM", ROOT / ".venv-vllm" / "bin" / "python"))
PROMPTS = [prompt(length, length) for length in (45, 60, 52)]
GAMMA, LIMIT = 3, 32
FEATURES = [1, 3, 5]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(patience(900)),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM at {PYTHON}: make setup-vllm"),
]


class Served(NamedTuple):
    tokens: list[list[int]]
    counters: dict[str, Any]


def serve(folder: Path, target: Path, speculative: dict[str, Any] | None) -> Served:
    asked = {
        "target": str(target), "prompts": [tokens[0].tolist() for tokens in PROMPTS], "max_tokens": LIMIT,
        "speculative": speculative,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(asked))
    command = [str(PYTHON), str(Path(__file__).with_name("vllm_run.py")), str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    return Served(**json.loads(lines[0].removeprefix("RESULT ")))


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """Of a shape that vLLM's attention takes, and whose text is not one token."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=2048,
        initializer_range=0.15,
    )  # fmt: skip
    return prepare_model(LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION), VOCABULARY)


@pytest.fixture(scope="module")
def folder(target: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("target")
    export_model(target, tiny_tokenizer(), made)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(tmp_path_factory.mktemp("plain"), folder, None)


@torch.no_grad()
def counted(
    target: PreTrainedModel, head: FeatureHead, view: View, texts: list[list[int]]
) -> tuple[int, list[int]]:
    """Rounds, and acceptances by position, as an engine counts them.

    A round that begins before the last token drafts γ, and all that it accepts counts, also beyond the end.
    """
    rounds, accepted = 0, [0] * GAMMA
    large = decode_model(target)
    large.feature_layers = tuple(head.config.feature_layers)
    for tokens, text in zip(PROMPTS, texts, strict=True):
        length = tokens.shape[1]
        _, _, features = large.read(torch.cat([tokens, torch.tensor([text[:-1]])], 1), [])
        assert features is not None
        kept = head.prefix(tokens, features[:, :length], [(length, view)])
        told = tell_chains(head, kept, text, features[0, length - 1 : -1], GAMMA)
        count = 1
        for one in replay.rounds(told.match[0], text, GAMMA, len(text), False):
            if count >= LIMIT:
                break
            rounds += 1
            count += one.emitted
            for position in range(one.accepted):
                accepted[position] += 1
    return rounds, accepted


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


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "eagle3")
def test_a_served_head_is_the_replayed_one(
    target: PreTrainedModel,
    folder: Path,
    plain: Served,
    tmp_path: Path,
    options: dict[str, bool],
    window: int | None,
) -> None:
    head = trained_head(target, PROMPTS, **options)
    export_model(head, tiny_tokenizer(), tmp_path / "head")
    export_for(tmp_path / "head", tmp_path / "served", "vllm", 6, window)
    asked = {"method": "eagle3", "model": str(tmp_path / "served"), "num_speculative_tokens": GAMMA}
    served = serve(tmp_path, folder, asked)
    texts = [longer(target, tokens) for tokens in PROMPTS]
    assert served.tokens == plain.tokens == [text[:LIMIT] for text in texts]
    rounds, accepted = counted(
        target, head, FULL if window is None else View("window", window, sinks=0), texts
    )
    told = {name.removeprefix("vllm:spec_decode_num_"): value for name, value in served.counters.items()}
    assert told["drafts"] == rounds and told["draft_tokens"] == GAMMA * rounds
    assert told["accepted_tokens_per_pos"] == accepted and accepted[1] > 3, (accepted, rounds)
