"""Heads that training made, served by vLLM: its text is the target's, and it counts what replay counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode import replay
from pipeline.decode.chain_replay import tell_chains
from pipeline.decode.model import decode_model
from pipeline.metrics import Round
from pipeline.models.export import export_model
from pipeline.models.heads.eagle import FeatureHead
from pipeline.serving.export import export_for
from tests.helpers.feature_heads import OPTIONS, trained_head
from tests.helpers.tiny import tiny_tokenizer
from tests.helpers.vllm import GAMMA, LIMIT, NEEDS_VLLM, PROMPTS, Served, counted, serve

pytestmark = NEEDS_VLLM


@torch.no_grad()
def replayed(
    target: PreTrainedModel, head: FeatureHead, view: View, texts: list[list[int]]
) -> list[list[Round]]:
    large = decode_model(target)
    large.feature_layers = tuple(head.config.feature_layers)
    rounds = []
    for tokens, text in zip(PROMPTS, texts, strict=True):
        length = tokens.shape[1]
        _, _, features = large.read(torch.cat([tokens, torch.tensor([text[:-1]])], 1), [])
        assert features is not None
        kept = head.prefix(tokens, features[:, :length], [(length, view)])
        told = tell_chains(head, kept, text, features[0, length - 1 : -1], GAMMA)
        rounds.append(replay.rounds(told.match[0], text, GAMMA, len(text), False))
    return rounds


def test_a_head_in_the_format_of_speculators_is_the_same_head(
    target: PreTrainedModel, folder: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    head = trained_head(target, PROMPTS, **OPTIONS[1])
    export_model(head, tiny_tokenizer(), tmp_path / "head")
    export_for(tmp_path / "head", tmp_path / "served", "speculators", 6, 16, target=folder)
    asked = {"method": "eagle3", "model": str(tmp_path / "served"), "num_speculative_tokens": GAMMA}
    served = serve(tmp_path, folder, asked)
    assert served.tokens == [text[:LIMIT] for text in texts]
    view = View("window", 16, sinks=0)
    assert served.told == counted(replayed(target, head, view, texts))


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "eagle3")
def test_a_served_head_is_the_replayed_one(
    target: PreTrainedModel,
    folder: Path,
    plain: Served,
    texts: list[list[int]],
    tmp_path: Path,
    options: dict[str, bool],
    window: int | None,
) -> None:
    head = trained_head(target, PROMPTS, **options)
    export_model(head, tiny_tokenizer(), tmp_path / "head")
    export_for(tmp_path / "head", tmp_path / "served", "vllm", 6, window)
    asked = {"method": "eagle3", "model": str(tmp_path / "served"), "num_speculative_tokens": GAMMA}
    served = serve(tmp_path, folder, asked)
    assert served.tokens == plain.tokens == [text[:LIMIT] for text in texts]
    view = FULL if window is None else View("window", window, sinks=0)
    promised = counted(replayed(target, head, view, texts))
    assert served.told == promised and promised[2][1] > 3, promised
