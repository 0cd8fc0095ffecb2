"""Draft sources: where the proposals of a round come from. Another source is another small class.

`speculate` asks a source for the proposals of one round, and passes it the tokens of the text that it has not
read yet; the first of them is continuation token `step_B`. Proposals before them were accepted, proposals
beyond them were rejected. There are at most two such tokens, so a source must have read all of its proposals
but the last. A source stores what it has read by position: a rejected token is overwritten later, and there
is no roll-back.

Shape legend: B rows, one a prompt; Q tokens not read yet; T proposals of a round; S tokens held; V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.decode.runner import Runner
from pipeline.decode.sampling import Sampler
from pipeline.kv.refresh import Refresh

LONGEST_MATCH = 3  # tokens that prompt lookup compares, at most


class Proposals(NamedTuple):
    """Of one round: tokens [B, T], their best logits [B, T] (not finite where a model failed), when sampling
    the probabilities [B, T, V] that they were drawn from, and how many of each row count (None: all T)."""

    tokens_BT: Tensor
    best_BT: Tensor
    probabilities_BTV: Tensor | None
    lengths: list[int] | None = None


class DraftSource(Protocol):
    """What speculation asks of a source."""

    name: str

    def check_room(self, needed: int) -> None:
        """Raises ValueError if the source cannot hold so many continuation tokens."""
        ...

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        """At most γ proposals behind the tokens `unread_BQ`, the first being continuation token `step_B`.

        What is proposed for a row that is not open, since its text has ended, does not matter.
        """
        ...

    def observe(self, report_BR: Tensor, features_BQF: Tensor | None, step_B: Tensor) -> None:
        """Hear what `steps.verify` reported, and the target's features of what it read from `step_B` on.

        Sources that derive from this class need not.
        """
        return None


class ModelDrafts(DraftSource):
    """A model behind its view: the trained drafter, or the target itself behind a sparse view.

    Args:
        threshold: stop drafting behind a proposal that the model gives less probability than this. The
            proposal itself is still verified: dropping it would favour the likely ones. Above 0 the host
            waits for the device after every proposal.
        refresh: chooses the kept entries again.
    """

    def __init__(self, runner: Runner, threshold: float = 0.0, refresh: Refresh | None = None) -> None:
        self.runner, self.threshold, self.name = runner, threshold, runner.model.name
        self.refresh = refresh

    def check_room(self, needed: int) -> None:
        self.runner.cache.check_room(needed)

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        uniforms_TB = sampler.uniforms(gamma, by_row=False)
        if self.threshold > 0:
            unread = [(unread_BQ, step_B)]

            def following(uniform_B: Tensor | None) -> tuple[Tensor, ...]:
                made: tuple[Tensor, ...] = self.runner.propose_surely(sampler.rule, *unread[-1], uniform_B)
                unread.append((made[0], made[1]))
                return made

            return self.propose_until(following, gamma, uniforms_TB, open_rows)
        return Proposals(*self.runner.draft(sampler.rule, gamma, unread_BQ, step_B, uniforms_TB))

    def observe(self, report_BR: Tensor, features_BQF: Tensor | None, step_B: Tensor) -> None:
        if self.refresh is not None:
            self.refresh.observe(report_BR[:, 0], step_B)

    def propose_until(
        self,
        following: Callable[[Tensor | None], tuple[Any, ...]],
        gamma: int,
        uniforms_TB: Tensor | None,
        open_rows: Sequence[bool],
    ) -> Proposals:
        """Draft until every row has a proposal with less confidence than the threshold, or γ proposals.

        Args:
            following: gives the next proposal, as `steps.propose_surely` does.
        """
        tokens: list[Tensor] = []
        bests: list[Tensor] = []
        probabilities: list[Tensor] = []
        lengths = [0] * len(open_rows)
        drafting = list(open_rows)
        while any(drafting):
            uniform_B = None if uniforms_TB is None else uniforms_TB[len(tokens)]
            token_B1, _, best_B, q_BV, confidence_B, *_ = following(uniform_B)
            tokens.append(token_B1)
            bests.append(best_B)
            probabilities += [] if q_BV is None else [q_BV]
            for row, confidence in enumerate(confidence_B.tolist()):
                lengths[row] += drafting[row]
                drafting[row] = drafting[row] and len(tokens) < gamma and not confidence < self.threshold
        padding = padded(len(tokens), gamma) - len(tokens)
        tokens += tokens[-1:] * padding
        bests += bests[-1:] * padding
        probabilities += probabilities[-1:] * padding
        q_BTV = torch.stack(probabilities, 1) if probabilities else None
        return Proposals(torch.cat(tokens, 1), torch.stack(bests, 1), q_BTV, lengths)


class Logged(DraftSource):
    """A source that keeps what it proposed: `proposed[r]` [B, T] in round r of the decoding."""

    def __init__(self, source: DraftSource) -> None:
        self.source, self.name = source, source.name
        self.proposed: list[Tensor] = []

    def check_room(self, needed: int) -> None:
        self.source.check_room(needed)

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        offer = self.source.propose(sampler, gamma, unread_BQ, step_B, open_rows)
        self.proposed.append(offer.tokens_BT)
        return offer

    def observe(self, report_BR: Tensor, features_BQF: Tensor | None, step_B: Tensor) -> None:
        self.source.observe(report_BR, features_BQF, step_B)


class LookupDrafts(DraftSource):
    """Prompt lookup: propose what followed an earlier occurrence of the last tokens, in prompt or text.

    The longest match of at most `LONGEST_MATCH` tokens counts, among equals the latest. Where fewer than γ
    tokens have followed it, as in a loop, they are repeated. No model is needed; a row without a match
    proposes nothing.
    """

    name = "prompt_lookup"

    def __init__(
        self, prompts: Sequence[Sequence[int]], room: int, num_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.room, self.num_tokens = room, num_tokens
        longest = max(len(prompt) for prompt in prompts)
        self.held_BS = torch.zeros(len(prompts), longest + room, dtype=torch.long, device=device)
        for row, prompt in enumerate(prompts):
            self.held_BS[row, : len(prompt)] = torch.tensor(prompt, device=device)
        self.prefix_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.place_S = torch.arange(longest + room, device=device)

    def check_room(self, needed: int) -> None:
        if self.room < needed:
            raise ValueError(f"prompt lookup has room for {self.room} continuation tokens, not {needed}")

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        first_B1 = (self.prefix_B + step_B).unsqueeze(1)
        self.held_BS.scatter_(1, first_B1 + self.place_S[: unread_BQ.shape[1]], unread_BQ)
        end_B1 = first_B1 + unread_BQ.shape[1]  # tokens known
        alike_BS = self.place_S < end_B1 - 1
        matched_BS = torch.zeros_like(self.held_BS)
        for back in range(LONGEST_MATCH):
            last_B1 = self.held_BS.gather(1, (end_B1 - 1 - back).clamp_min(0))
            there_BS = self.held_BS.roll(back, 1) == last_B1
            alike_BS = alike_BS & there_BS & (self.place_S >= back)
            matched_BS += alike_BS
        best_B1 = (matched_BS * len(self.place_S) + self.place_S).argmax(1, keepdim=True)
        found_B1 = matched_BS.gather(1, best_B1) > 0
        best_B1 = best_B1.where(found_B1, 0)
        matches = found_B1.squeeze(1).tolist()
        lengths = [gamma * (match and is_open) for match, is_open in zip(matches, open_rows, strict=True)]
        count = max(lengths) or 1
        since_B1 = end_B1 - 1 - best_B1
        tokens_BT = self.held_BS.gather(1, best_B1 + 1 + self.place_S[:count] % since_B1)
        # Accepted proposals are part of the text from now on; the others are overwritten.
        self.held_BS.scatter_(1, end_B1 + self.place_S[:count], tokens_BT)
        sure_BTV = None if sampler.rule.greedy else F.one_hot(tokens_BT, self.num_tokens).float()
        return Proposals(tokens_BT, torch.zeros_like(tokens_BT, dtype=torch.float), sure_BTV, lengths)


# Sources without a model, by their names in a config. Replay takes what they propose to be certain.
SOURCES: dict[str, Callable[..., DraftSource]] = {"prompt_lookup": LookupDrafts}


def padded(count: int, gamma: int) -> int:
    """The next power of two, within 1 and γ: verification then has few shapes."""
    return min(gamma, 1 << (max(count, 1) - 1).bit_length())
