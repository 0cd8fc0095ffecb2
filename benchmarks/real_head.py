"""A head over a real target on a CPU: what its draft step costs, and what replaying costs beside decoding.

The head is as it begins, from the target's last layer: hardly anything of it is accepted, so that decoding
takes more rounds than with a trained one; how often it was accepted stands in the row's note.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.decoding import random_runner
from benchmarks.pairs import NEVER
from benchmarks.rows import Row, interleaved, ratios, row, seconds_of
from pipeline.axes import FULL, View
from pipeline.decode import replay
from pipeline.decode.chain_replay import tell_chains
from pipeline.decode.feature_head import HeadDrafts, LeanHead
from pipeline.decode.loop import autoregressive, speculate
from pipeline.decode.model import DecodeModel, decode_model
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import GREEDY
from pipeline.decode.target_reader import TargetReader
from pipeline.kv.slot_cache import slots_for
from pipeline.metrics import Round
from pipeline.models.heads.begin import default_layers, head_of

WINDOWS = (View("window", 64, sinks=0), View("window", 256, sinks=0), FULL)
GAMMAS = (1, 2, 3, 4, 6)
PROPOSABLE, ROOM = 8192, 32


def head_over(target: PreTrainedModel) -> LeanHead:
    """A head with a draft vocabulary of 8K tokens, as training would begin with it."""
    tokens = torch.arange(min(PROPOSABLE, target.whole_tokens))
    module = head_of(target, tokens, default_layers(target.config.num_hidden_layers)).eval()
    return LeanHead(module, TargetReader(decode_model(target)))


@torch.no_grad()
def step_row(target: PreTrainedModel, kept: int, name: str, repeats: int) -> Row:
    """One proposal of a chain behind so many entries, beside an autoregressive step behind as many."""
    small = head_over(target)
    large = small.reader.target
    drafting, plain = (random_runner(model, kept, slots_for(kept), ROOM, "none") for model in (small, large))
    last_BF = torch.randn(1, small.module.fc.in_features)
    token, first = torch.full((1, 1), 5), torch.full((1,), 1)

    def autoregress() -> None:
        plain.cache.kept_B.fill_(kept)
        list(autoregressive(plain, [5], 2, NEVER, GREEDY))

    def chain(gamma: int) -> None:
        drafting.cache.kept_B.fill_(kept)
        HeadDrafts(drafting, last_BF).propose(GREEDY, gamma, token, first, [True])

    runs = {
        "AR": partial(seconds_of, autoregress),
        "one": partial(seconds_of, partial(chain, 1)),
        "five": partial(seconds_of, partial(chain, 5)),
    }
    seconds = interleaved(runs, 3 * repeats)
    # What a further proposal costs: the first of a chain also reads features.
    each = [(five - one) / 4 for five, one in zip(seconds["five"], seconds["one"], strict=True)]
    return row(f"draft head, 8K tokens ÷ AR step, {name}", ratios(each, seconds["AR"]))


class Behind:
    """A target and a head behind one prompt, read once for all windows."""

    def __init__(self, target: PreTrainedModel, prompt_1S: Tensor, new_tokens: int) -> None:
        self.head, self.new_tokens, length = head_over(target), new_tokens, prompt_1S.shape[1]
        cuts = [(length, view) for view in WINDOWS]
        self.kept, logits_BV = self.head.prefill(prompt_1S, cuts)
        large = self.head.reader.target
        (whole,), _ = large.prefill(prompt_1S, [(length, FULL)])
        room = new_tokens + max(GAMMAS)
        self.verifying = runner_of(large, slots_for(length), room)
        self.drafting = [runner_of(self.head, slots_for(view.kept), room) for view in self.kept]
        self.verifying.cache.load([whole])
        for runner, view in zip(self.drafting, self.kept, strict=True):
            runner.cache.load([view])
        first = int(logits_BV.argmax())
        steps = autoregressive(self.verifying, [first], new_tokens, NEVER, GREEDY)
        self.text = [first, *(token for (token,) in steps if token is not None)]
        self.features_QF = self.head.reader.text_features(prompt_1S, self.text)

    def decoded(self) -> list[list[Round]]:
        """The rounds of every window and γ, one after the other."""
        made = []
        for runner, view in zip(self.drafting, self.kept, strict=True):
            assert view.last is not None
            for gamma in GAMMAS:
                source = HeadDrafts(runner, view.last)
                of_row = speculate(
                    self.verifying, source, self.text[:1], gamma, self.new_tokens, NEVER, GREEDY
                )
                made.append([one for (one,) in of_row if one is not None])
        return made

    def replayed(self) -> list[list[Round]]:
        """The same, from one pass over the text."""
        told = tell_chains(self.head.module, self.kept, self.text, self.features_QF, max(GAMMAS))
        of_text = self.new_tokens, False
        return [
            list(replay.rounds(match, self.text, gamma, *of_text)) for match in told.match for gamma in GAMMAS
        ]


def runner_of(model: DecodeModel, capacity: int, room: int) -> Runner:
    return Runner(model, 1, capacity, room, "none")


@torch.no_grad()
def replay_row(target: PreTrainedModel, prompt_1S: Tensor, new_tokens: int, name: str, repeats: int) -> Row:
    """Seconds of replaying every γ behind every window ÷ those of decoding them, features in hand."""
    behind = Behind(target, prompt_1S, new_tokens)
    rounds = behind.replayed()
    assert rounds == behind.decoded(), f"{name}: replay is not decoding"
    runs = {
        "replay": lambda: seconds_of(behind.replayed),
        "decode": lambda: seconds_of(behind.decoded),
    }
    seconds = interleaved(runs, max(2, repeats // 5))
    return row(
        f"replay of {len(GAMMAS)} γ behind {len(WINDOWS)} windows ÷ decoding them, head, {name}",
        ratios(seconds["replay"], seconds["decode"]),
        0.03,
        at_most=True,
        note=f"{new_tokens} tokens, prefills and the text's features not counted; accepted "
        f"{percent(rounds)} of proposals",
    )


def percent(runs: Sequence[Sequence[Round]]) -> str:
    accepted = sum(one.accepted for rounds in runs for one in rounds)
    proposed = sum(one.proposed or 0 for rounds in runs for one in rounds)
    return f"{100 * accepted / proposed:.0f} %"


def head_rows(target: PreTrainedModel, prompt_1S: Tensor, name: str, repeats: int) -> Iterator[Row]:
    yield step_row(target, prompt_1S.shape[1], name, repeats)
    yield replay_row(target, prompt_1S, 64, name, repeats)
