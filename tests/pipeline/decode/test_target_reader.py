"""The target's readings for heads: each prompt once for all of them, and what a plain forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import FULL, View
from pipeline.decode import target_reader
from pipeline.decode.feature_head import LeanHead
from pipeline.decode.model import decode_model
from pipeline.decode.target_reader import TargetReader
from pipeline.errors import BadData
from pipeline.models.heads.begin import head_of
from pipeline.models.heads.eagle import FeatureHead
from tests.helpers.feature_heads import prompt, six_layers

LAYERS = (1, 3, 5)
PROMPTS = [prompt(length, seed) for seed, length in enumerate((45, 41, 45))]
TEXT = [7, 9, 3, 88, 24]


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return six_layers(1)


def head(target: PreTrainedModel, layers: tuple[int, ...] = LAYERS) -> FeatureHead:
    return head_of(target, torch.arange(3, 60), list(layers))


@pytest.fixture
def counted(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> tuple[TargetReader, list[int]]:
    """A reader, and the lengths of the prompts that its target has read so far."""
    reader, read = TargetReader(decode_model(target)), []
    before = reader.target.read

    def counting(tokens_BS: Tensor, cuts: Any) -> Any:
        read.append(tokens_BS.shape[1])
        return before(tokens_BS, cuts)

    monkeypatch.setattr(reader.target, "read", counting)
    return reader, read


@torch.no_grad()
def plain(target: PreTrainedModel, tokens_1S: Tensor) -> Tensor:
    """The inputs [S, F] of the layers, by transformers."""
    states = target(tokens_1S, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in LAYERS], -1)


def test_heads_share_what_the_target_read(
    target: PreTrainedModel, counted: tuple[TargetReader, list[int]]
) -> None:
    reader, read = counted
    heads = [LeanHead(head(target), reader) for _ in range(2)]
    for small in heads:
        for tokens in PROMPTS:
            _, logits = small.prefill(
                tokens, [(tokens.shape[1], FULL), (tokens.shape[1], View("streaming", 16))]
            )
            features = reader.text_features(tokens, TEXT)
            whole = torch.cat([tokens, torch.tensor([TEXT[:-1]])], 1)
            at = tokens.shape[1] - 1
            torch.testing.assert_close(features, plain(target, whole)[at : at + len(TEXT) - 1])
            torch.testing.assert_close(logits, target(tokens).logits[:, -1].detach())
    assert read == [45, 41, 45], "prompts of one length are not one prompt"


def test_a_view_that_is_gone_is_read_anew_for_another_text(
    target: PreTrainedModel, counted: tuple[TargetReader, list[int]]
) -> None:
    reader, read = counted
    small = LeanHead(head(target), reader)
    small.prefill(PROMPTS[0], [(45, FULL)])
    first = reader.text_features(PROMPTS[0], TEXT)
    reader.last = None
    torch.testing.assert_close(reader.text_features(PROMPTS[0], TEXT), first)
    assert read == [45], "the text's features are held"
    other = reader.text_features(PROMPTS[0], [*TEXT[:2], 5, 6])
    torch.testing.assert_close(other[:2], first[:2])
    assert read == [45, 45]


def test_no_more_is_held_than_fits(
    target: PreTrainedModel, counted: tuple[TargetReader, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, read = counted
    small = LeanHead(head(target), reader)
    one = (45 + len(TEXT) - 1) * len(LAYERS) * target.config.hidden_size * 4
    monkeypatch.setattr(target_reader, "HELD_BYTES", 2 * one)
    for tokens in (*PROMPTS, PROMPTS[1], PROMPTS[0]):
        small.prefill(tokens, [(tokens.shape[1], FULL)])
        reader.text_features(tokens, TEXT)
        assert reader.num_bytes <= 2 * one
        assert {key for key, _ in reader.texts} <= set(reader.held)
    assert read == [45, 41, 45, 45], "the second is still there, the first is not"
    reader.forget()
    assert reader.num_bytes == 0 and reader.last is None


def test_heads_of_other_layers_are_refused_together(target: PreTrainedModel) -> None:
    reader = TargetReader(decode_model(target))
    LeanHead(head(target), reader)
    with pytest.raises(BadData, match=r"reads features of layers \[0, 2, 4\], and another of \[1, 3, 5\]"):
        LeanHead(head(target, (0, 2, 4)), reader)
