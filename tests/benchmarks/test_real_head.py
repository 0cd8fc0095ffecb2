"""What a head costs over a target: rows that a toy gives too, of rounds that replay and decoding share."""

from __future__ import annotations

import torch

from benchmarks.real_head import GAMMAS, WINDOWS, Behind, head_rows
from tests.helpers.feature_heads import prompt, six_layers


@torch.no_grad()
def test_replay_gives_the_rounds_that_were_decoded() -> None:
    behind = Behind(six_layers(1), prompt(80, 3), 24)
    replayed = behind.replayed()
    assert len(replayed) == len(GAMMAS) * len(WINDOWS)
    assert replayed == behind.decoded() == behind.decoded(), "and again, with the caches used before"
    for rounds in replayed:
        assert [behind.text[0], *(token for one in rounds for token in one.tokens)] == behind.text
    behind.text = [max(token - 1, 0) for token in behind.text]
    assert behind.replayed() != replayed


def test_rows_of_a_toy() -> None:
    step, replayed = head_rows(six_layers(1), prompt(80, 3), "toy", 4)
    assert step.row == "draft head, 8K tokens ÷ AR step, toy" and step.value > 0
    assert 0 < replayed.value < 1 and replayed.target == 0.03 and "accepted" in replayed.note
