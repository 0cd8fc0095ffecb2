"""Exact acceptance of every γ from one forward pass of the drafter, and its expectation when sampling.

Greedy speculation is lossless: whatever the drafter proposes, the emitted tokens are the target's greedy
continuation. A view is fixed when the prefix ends, and behind it the drafter only ever builds on emitted
tokens. So one teacher-forced forward over the stored continuation says, for each token, whether the drafter
would have proposed it (`match`), and the rounds of any γ follow by counting.

A head's chains depend on where a round begins; `chain_replay.py` gives, for every token, what a chain from
there would propose, and the rounds follow as well.

Sampling is lossless in distribution. Along a continuation that the target sampled, a proposal for token y is
accepted with probability min(1, q(y) ÷ p(y)) given that y is emitted: the drafter proposes y with q(y), it is
accepted with min(1, p(y) ÷ q(y)), and y is emitted with p(y). These events are independent given the text, so
that expected rounds and acceptance follow without drawing a proposal (`expect`). That is an estimate, over
the texts that were sampled.

Where entries are chosen again (`kv/refresh.py`), what is proposed depends on when: each γ is replayed alone,
a few rounds at a time (`refreshed_rounds`).

Shape legend: R views, C chunks of the prefix, Q = M - 1 tokens after the first of a continuation of M, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.decode.sampling import GREEDY
from pipeline.decode.sources import DraftSource
from pipeline.errors import NotFinite
from pipeline.kv.refresh import chosen
from pipeline.kv.view_cache import ViewCache, read_continuation
from pipeline.kv.views import PrefixView
from pipeline.metrics import Counts, Round, counted_proposals
from pipeline.models.draft_vocabulary import among_all, draft_tokens


# Not inference mode: training validates with this, and goes on with the weights that ZeRO-3 gathers here.
@torch.no_grad()
def view_logits(drafter: PreTrainedModel, views: Sequence[PrefixView], continuation: Sequence[int]) -> Tensor:
    """Logits [R, Q, V] of the drafter behind each view, for every token of a continuation but the first.

    Args:
        views: R views with one row each, all cut at the same prefix length.
        continuation: [M] tokens, the first being the one that the prefill gives.
    """
    device, prefix_tokens = drafter.device, views[0].prefix_tokens
    tokens_M = torch.tensor(continuation, device=device)
    inputs = tokens_M.shape[0] - 1
    # Equal lengths side by side share one attention call; rows are put back in the caller's order below.
    order = sorted(range(len(views)), key=lambda row: views[row].kept)
    cache = ViewCache([views[row] for row in order], capacity=inputs)
    positions_1Q = torch.arange(prefix_tokens, prefix_tokens + inputs, device=device).unsqueeze(0)
    logits_RQV = read_continuation(drafter, cache, tokens_M[:-1].expand(len(views), inputs), positions_1Q)
    in_order_RQV = logits_RQV[torch.tensor(order, device=device).argsort()]
    return among_all(in_order_RQV, draft_tokens(drafter), drafter.whole_tokens)


def finite_views(logits_RQV: Tensor) -> list[bool]:
    """[R] whether all logits behind a view are finite; where they are not, the view has no results."""
    return torch.isfinite(logits_RQV).flatten(1).all(1).tolist()


def match_views(logits_RQV: Tensor, continuation: Sequence[int]) -> list[list[bool]]:
    """[R][Q] whether the drafter would propose each token; column t is for `continuation[t + 1]`."""
    following_Q = torch.tensor(continuation[1:], device=logits_RQV.device)
    return (logits_RQV.argmax(-1) == following_Q).tolist()


def confidences(logits_RQV: Tensor) -> list[list[float]]:
    """[R][Q] the probability that the drafter gives its own greedy proposal."""
    return logits_RQV.float().softmax(-1).amax(-1).tolist()


def chances(
    logits_RQV: Tensor, continuation: Sequence[int], log_probs: Sequence[float], temperature: float
) -> np.ndarray:
    """[R, Q] min(1, q ÷ p): the probability that a proposal was accepted, given the token that was emitted.

    Args:
        log_probs: [M] the target's log-probability, at `temperature`, of each token of its continuation.
    """
    following_Q = torch.tensor(continuation[1:], device=logits_RQV.device)
    log_q_RQV = (logits_RQV.float() / temperature).log_softmax(-1)
    log_q_RQ = log_q_RQV.gather(-1, following_Q.expand(len(logits_RQV), -1).unsqueeze(-1)).squeeze(-1)
    log_p_Q = torch.tensor(log_probs[1:], device=logits_RQV.device)
    return (log_q_RQ - log_p_Q).clamp_max(0).exp().double().cpu().numpy()


@dataclass(frozen=True)
class Told:
    """What a drafter would have proposed along a continuation, behind each of R views.

    `match` and `sure` are [R][Q] as `match_views` and `confidences` give them, or [R][Q][T] for chains from
    every token; `chances` likewise. Of a greedy text there are no chances, of a sampled one no matches.
    """

    finite: list[bool]
    match: Any = ()
    sure: Any = ()
    chances: np.ndarray | None = None


def tell(
    logits_RQV: Tensor,
    continuation: Sequence[int],
    temperature: float,
    log_probs: Sequence[float],
    surely: bool,
) -> Told:
    """What the logits behind each view say.

    Args:
        surely: whether confidences are wanted.
    """
    finite = finite_views(logits_RQV)
    if temperature > 0:
        return Told(finite, chances=chances(logits_RQV, continuation, log_probs, temperature))
    sure = confidences(logits_RQV) if surely else ()
    return Told(finite, match_views(logits_RQV, continuation), sure)


def rounds(
    match: Sequence[bool] | Sequence[Sequence[bool]],
    continuation: Sequence[int],
    gamma: int,
    limit: int,
    ends_with_eos: bool,
    stops: Sequence[bool] | Sequence[Sequence[bool]] | None = None,
) -> list[Round]:
    """The rounds of a continuation, as decoding would have them.

    Args:
        match: whether the drafter would propose each token after the first, [M - 1] of [M]; or whether a
            chain from each token would propose what follows, [M - 1][γ and more]. So for `stops`.
        limit: most tokens of a continuation, the first included; a round proposes at most what is left.
        ends_with_eos: the continuation ended by itself, so proposals behind its end do not count.
        stops: where drafting may stop early, whether it stops behind the proposal for each token. How many
            proposals follow a wrong one is then unknown: `proposed` is None.
    """
    result: list[Round] = []
    start, total = 0, len(match)
    while start < total:
        accepted, stopped, room = 0, False, min(gamma, total - start)
        hits, ends = proposals(match, start, room), None if stops is None else proposals(stops, start, room)
        while accepted < room and not stopped and hits[accepted]:
            stopped = ends is not None and ends[accepted]
            accepted += 1
        fewest = most = gamma  # proposals, as far as known
        if ends is not None and accepted < gamma:
            fewest = accepted if stopped or accepted == room else accepted + 1
            most = fewest if stopped or (accepted < room and ends[accepted]) else gamma
        emitted = min(accepted + 1, total - start)
        ended = ends_with_eos and start + emitted == total
        bounds = {counted_proposals(n, limit - 1 - start, emitted, ended) for n in (fewest, most)}
        proposed = bounds.pop() if len(bounds) == 1 else None
        result.append(Round(tuple(continuation[start + 1 : start + 1 + emitted]), proposed, accepted))
        start += emitted
    return result


def proposals(values: Any, start: int, count: int) -> Sequence[bool]:
    """What is said of the proposals of a round from a token on."""
    along = isinstance(values[start], bool | np.bool_)
    found: Sequence[bool] = values[start : start + count] if along else values[start][:count]
    return found


Match = Callable[[PrefixView, int, int], Sequence[object]]


def refreshed_rounds(
    match: Match,
    first: PrefixView,
    whole: PrefixView,
    shares_QC: Tensor,
    frequencies: Tensor | None,
    continuation: Sequence[int],
    gamma: int,
    limit: int,
    ends_with_eos: bool,
) -> list[Round]:
    """As `rounds`, behind entries that are chosen again.

    Args:
        match: of a choice, what the drafter would propose from one token of the text on and before another,
            as `rounds` takes it; asked in the text's order.
        first: the choice at the prefix's end.
        shares_QC: of the prefix's chunks in what each of the first Q = M - 1 tokens attends to.
    """
    view, total = first.view, len(continuation) - 1
    assert view.refresh
    result: list[Round] = []
    kept, start = first, 0
    while start < total:
        end = min(total, start + view.refresh * (gamma + 1))
        known = match(kept, start, end)
        beyond = False if isinstance(known[0], bool) else [False] * gamma  # that n rounds do not reach
        hits: Any = [*known, *[beyond] * (total - end)]
        of_text = continuation[start:], gamma, limit - start, ends_with_eos
        made = rounds(hits, *of_text)[: view.refresh]
        result += made
        last = start + sum(one.emitted for one in made[:-1])
        start = last + made[-1].emitted
        stands = slice(last, last + made[-1].accepted + 1)
        kept = chosen(whole, view, shares_QC[stands].mean(0, keepdim=True), frequencies)
    return result


class ModelMatch:
    """Of a causal drafter: its continuation KV are those of the choices that it was read behind."""

    def __init__(self, drafter: PreTrainedModel, first: PrefixView, continuation: Sequence[int]) -> None:
        self.drafter, self.text = drafter, continuation
        self.cache = ViewCache([first], capacity=len(continuation) - 1)

    @torch.no_grad()
    def __call__(self, kept: PrefixView, start: int, end: int) -> list[bool]:
        # A round begins with the last two tokens: the one before the last is read again.
        begin = max(0, start - 1)
        self.cache.exchange(kept, begin)
        device, S = self.drafter.device, kept.prefix_tokens
        tokens_1Q = torch.tensor([self.text[begin:end]], device=device)
        positions_1Q = torch.arange(S + begin, S + end, device=device).unsqueeze(0)
        logits_1QV = read_continuation(self.drafter, self.cache, tokens_1Q, positions_1Q)
        logits_1QV = among_all(logits_1QV, draft_tokens(self.drafter), self.drafter.whole_tokens)
        if not all(finite_views(logits_1QV)):
            raise NotFinite("logits not finite in replay")
        (match,) = match_views(logits_1QV, self.text[begin : end + 1])
        return match[start - begin :]


def source_rounds(
    source: DraftSource, continuation: Sequence[int], gamma: int, limit: int, ends_with_eos: bool
) -> list[Round]:
    """As `rounds`, for any source with one row: greedy decoding with the stored continuation as the target.

    For sources whose proposals depend on where a round begins, such as prompt lookup.
    """
    result: list[Round] = []
    known, unread = 1, list(continuation[:1])
    while known < len(continuation):
        step_B = torch.tensor([known - len(unread)])
        offer = source.propose(GREEDY, gamma, torch.tensor([unread]), step_B, [True])
        length = gamma if offer.lengths is None else offer.lengths[0]
        accepted = 0
        for ours, theirs in zip(offer.tokens_BT[0, :length].tolist(), continuation[known:], strict=False):
            if ours != theirs:
                break
            accepted += 1
        emitted = min(accepted + 1, len(continuation) - known)
        ended = ends_with_eos and known + emitted == len(continuation)
        proposed = counted_proposals(length, limit - known, emitted, ended)
        result.append(Round(tuple(continuation[known : known + emitted]), proposed, accepted))
        known += emitted
        unread = list(continuation[known - 2 : known])
    return result


def expect(chances_RQ: np.ndarray, gamma: int, limit: int, ends_with_eos: bool) -> list[Counts]:
    """The expected counts of the rounds of a sampled continuation, behind each of R views.

    Of chains from every token, chances are [R, Q, γ and more].

    `starts[:, s]` is the probability that a round begins at token s; a round passes it on to the tokens where
    the next round may begin: behind its first rejected proposal, or behind its bonus token.
    """
    R, total = chances_RQ.shape[:2]
    starts = np.zeros((R, total + gamma + 2))
    starts[:, 0] = 1
    proposed_R = np.zeros(R)
    reached, kept = np.zeros((R, gamma)), np.zeros((R, gamma))
    for start in range(total):
        begun_R1 = starts[:, start : start + 1]
        along = chances_RQ.ndim == 2
        given_RJ = chances_RQ[:, start : start + gamma] if along else chances_RQ[:, start, : total - start]
        kept_RJ = begun_R1 * given_RJ[:, :gamma].cumprod(1)
        reached_RJ = np.concatenate([begun_R1, kept_RJ[:, :-1]], 1)
        J = kept_RJ.shape[1]
        starts[:, start + 1 : start + 1 + J] += reached_RJ - kept_RJ
        if gamma == J:
            starts[:, start + gamma + 1] += kept_RJ[:, -1]
        reached[:, :J] += reached_RJ
        kept[:, :J] += kept_RJ
        most = min(gamma, limit - 1 - start)
        proposed_R += begun_R1[:, 0] * most
        if ends_with_eos and start + J == total:  # what lies behind the end was not proposed
            proposed_R -= reached_RJ[:, -1] * (most - min(most, J))
    num_rounds_R = starts[:, :total].sum(1)
    return [
        Counts(
            num_tokens=total,
            num_rounds=float(num_rounds_R[row]),
            num_proposed=float(proposed_R[row]),
            num_accepted=float(kept[row].sum()),
            reached=tuple(reached[row].tolist()),
            kept=tuple(kept[row].tolist()),
        )
        for row in range(R)
    ]
