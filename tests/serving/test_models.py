"""Draft models and prompt lookup in vLLM: its text is the target's, and a full cache counts as replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.axes import FULL, View
from pipeline.decode import replay
from pipeline.decode.model import decode_model
from pipeline.kv.view_cache import ATTENTION
from pipeline.models.build import prepare_model
from pipeline.models.export import export_model
from pipeline.models.layers import keep_layers
from pipeline.serving.export import export_for
from pipeline.serving.flags import speculation
from tests.helpers.tiny import VOCABULARY, tiny_tokenizer
from tests.helpers.vllm import GAMMA, LIMIT, NEEDS_VLLM, PROMPTS, Served, counted, serve

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def drafter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of the target's six layers, a little off: right often, and not always."""
    made: Path = tmp_path_factory.mktemp("drafter") / "made"
    model = keep_layers(AutoModelForCausalLM.from_pretrained(folder), (0, 1, 2, 3, 4))
    torch.manual_seed(0)
    export_model(prepare_model(model, VOCABULARY), tiny_tokenizer(), made)
    return made


def asked(flags: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `speculation` says on a command line, as the engine's arguments."""
    given = json.loads(flags.split("'")[1])
    switched = "--disable-hybrid-kv-cache-manager" in flags
    return given, {"disable_hybrid_kv_cache_manager": True} if switched else {}


@torch.no_grad()
def promised(drafter: Path, texts: list[list[int]], view: View) -> Any:
    """The counts of replay behind a view."""
    loaded = AutoModelForCausalLM.from_pretrained(drafter, attn_implementation=ATTENTION)
    model = prepare_model(loaded, VOCABULARY)
    rounds = []
    for tokens, text in zip(PROMPTS, texts, strict=True):
        kept, _ = decode_model(model).prefill(tokens, [(tokens.shape[1], view)])
        told = replay.tell(replay.view_logits(model, kept, text), text, 0.0, (), False)
        rounds.append(replay.rounds(told.match[0], text, GAMMA, len(text), False))
    return counted(rounds)


@pytest.mark.parametrize("window", [None, 16])
def test_a_served_draft_model_is_the_replayed_one(
    folder: Path, drafter: Path, plain: Served, texts: list[list[int]], window: int | None, tmp_path: Path
) -> None:
    """Behind a window with the switch that `speculation` asks for."""
    export_for(drafter, tmp_path / "served", "vllm", window=window)
    given, engine = asked(speculation("vllm", "first_layers", GAMMA, str(tmp_path / "served"), window))
    assert engine == ({} if window is None else {"disable_hybrid_kv_cache_manager": True})
    served = serve(tmp_path, folder, given, **engine)
    assert served.tokens == plain.tokens == [text[:LIMIT] for text in texts]
    whole = promised(drafter, texts, FULL)
    expected = whole if window is None else promised(drafter, texts, View("window", window, sinks=0))
    assert served.told == expected and expected[2][0] > 3, expected
    assert window is None or expected != whole, "the window acts"


def test_without_the_switch_the_text_is_not_the_targets(
    folder: Path, drafter: Path, plain: Served, tmp_path: Path
) -> None:
    """Of vLLM 0.32. Where this fails the engine has been mended, and the switch may go."""
    export_for(drafter, tmp_path / "served", "vllm", window=16)
    given, _ = asked(speculation("vllm", "first_layers", GAMMA, str(tmp_path / "served"), 16))
    assert serve(tmp_path, folder, given).tokens != plain.tokens


def test_prompt_lookup_keeps_the_text(folder: Path, plain: Served, tmp_path: Path) -> None:
    """Where the last tokens occurred twice it takes another place than ours, so that counts differ."""
    given, engine = asked(speculation("vllm", "prompt_lookup", GAMMA, ""))
    served = serve(tmp_path, folder, given, **engine)
    assert served.tokens == plain.tokens
    assert served.told[0] > 0
