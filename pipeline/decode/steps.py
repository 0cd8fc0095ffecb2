"""What a decoder does on the device without asking the host: propose a token, draft γ of them, verify them.

The steps are functions of tensors. `Runner` runs them for one model over one static cache: as they are,
compiled, or captured as CUDA graphs; a graph holds all γ draft steps, another one the verification. Compiled
code belongs to shapes, so that models and caches of equal shapes share it.

Shape legend: B rows, Q new tokens, T proposals of a round, T1 is T + 1, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import Rule
from pipeline.kv.slot_cache import SlotCache

Tensors = tuple[Tensor | None, ...]


def propose(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    tokens_BQ: Tensor,
    step_B: Tensor,
    uniform_B: Tensor | None,
    surely: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Read Q tokens, the first being continuation token `step_B`, and choose the next.

    Returns:
        The token [B, 1], its number [B], the best logit [B], when sampling all probabilities [B, V], and if
        `surely` the probability [B] that the model gives its token.
    """
    logits_BV = model.logits(model.hidden(tokens_BQ, step_B, cache)[:, -1])
    token_B, best_B, q_BV = rule.choose(logits_BV, uniform_B)
    token_B1, confidence_B = token_B.unsqueeze(1), None
    if surely:
        shares_BV = logits_BV.float().softmax(-1) if q_BV is None else q_BV
        confidence_B = shares_BV.gather(1, token_B1).squeeze(1)
    return token_B1, step_B + tokens_BQ.shape[1], best_B, q_BV, confidence_B


propose_surely = partial(propose, surely=True)


def advance(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    token_B1: Tensor,
    step_B: Tensor,
    uniform_B1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One autoregressive step: the next token [B, 1], its number [B], and the report to the host [B, 2].

    The report is the token, and 1 if the logits were finite.
    """
    uniform_B = None if uniform_B1 is None else uniform_B1[:, 0]
    token_B1, step_B, best_B, _, _ = propose(model, cache, rule, token_B1, step_B, uniform_B)
    return token_B1, step_B, torch.cat([token_B1, best_B.isfinite().unsqueeze(1).long()], 1)


def advance_noted(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    token_B1: Tensor,
    step_B: Tensor,
    uniform_B1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `advance`; the report [B, 4] also has the two numbers that `note` gives for the token."""
    logits_BV = model.logits(model.hidden(token_B1, step_B, cache)[:, -1])
    token_B, best_B, _ = rule.choose(logits_BV, None if uniform_B1 is None else uniform_B1[:, 0])
    report = [token_B, best_B.isfinite(), *note(rule, logits_BV, token_B)]
    return token_B.unsqueeze(1), step_B + 1, torch.stack([values.double() for values in report], 1)


def note(rule: Rule, logits_BV: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
    """How clear the target's choice of each token was.

    Returns:
        The top-1 minus the top-2 logit [B], and the log-probability [B] of each token; 0 when greedy.
    """
    allowed_BV = rule.allowed(logits_BV.float())
    top_B2 = allowed_BV.topk(2, dim=-1).values
    gap_B = top_B2[:, 0] - top_B2[:, 1]
    if rule.greedy:
        return gap_B, torch.zeros_like(gap_B)
    log_p_BV = (allowed_BV / rule.temperature).log_softmax(-1)
    return gap_B, log_p_BV.gather(-1, token_B.unsqueeze(1)).squeeze(1)


def verify(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    pair_B2: Tensor,
    draft_BT: Tensor,
    step_B: Tensor,
    best_BT: Tensor,
    q_BTV: Tensor | None,
    uniforms_BT1: Tensor | None,
    lengths_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Score the last of two tokens and T proposals in one pass, and accept.

    Returns:
        The report to the host [B, T + 4]: the number accepted, 1 if the target's logits were finite, 1 if the
        drafter's were, and the proposals with the target's token behind the accepted ones. Then what the next
        round begins with: the last two tokens [B, 2], and the number of the last [B]. And the features
        [B, T1, F] of the tokens that were read, where the model gives some.
    """
    tokens_BT1 = torch.cat([pair_B2[:, 1:], draft_BT], 1)
    hidden, features = model.hidden_and_features(tokens_BT1, step_B, cache)
    logits_BT1V = model.logits(hidden)
    if rule.dropmatch is None:
        accepted_B, next_B = rule.accept(draft_BT, q_BTV, logits_BT1V, uniforms_BT1, lengths_B, cache.backend)
    else:
        steps_B1 = (cache.prefix_B + step_B + 1).unsqueeze(1)
        accepted_B, next_B = rule.dropmatch.accept(
            model.logits,
            hidden[:, :-1],
            draft_BT,
            logits_BT1V.argmax(-1),
            steps_B1 + cache.step_R[: draft_BT.shape[1]],
            lengths_B,
            cache.backend,
        )
    # -1 means that nothing could be drawn and is no token; the host sees it by the logits' finiteness.
    accepted_B1, next_B1 = accepted_B.unsqueeze(1), next_B.clamp_min(0).unsqueeze(1)
    finite_B = [values.isfinite().all(1, keepdim=True).long() for values in (logits_BT1V.amax(-1), best_BT)]
    emitted_BT1 = torch.cat([draft_BT, next_B1], 1).scatter(1, accepted_B1, next_B1)
    report = torch.cat([accepted_B1, *finite_B, emitted_BT1], 1)
    pair_B2 = torch.cat([tokens_BT1.gather(1, accepted_B1), next_B1], 1)
    return report, pair_B2, step_B + accepted_B + 1, features


def draft(
    propose: Callable[..., Any], count: int, tokens_BQ: Tensor, step_B: Tensor, uniforms_TB: Tensor | None
) -> Tensors:
    """Propose `count` tokens, one after the other.

    Args:
        tokens_BQ: what the cache has not read yet, the first being continuation token `step_B`.

    Returns:
        The proposals [B, T], their best logits [B, T], and when sampling their probabilities [B, T, V].
    """
    tokens: list[Tensor] = []
    bests: list[Tensor] = []
    probabilities: list[Tensor] = []
    for number in range(count):
        uniform_B = None if uniforms_TB is None else uniforms_TB[number]
        tokens_BQ, step_B, best_B, q_BV, _ = propose(tokens_BQ, step_B, uniform_B)
        tokens.append(tokens_BQ)
        bests.append(best_B)
        probabilities += [] if q_BV is None else [q_BV]
    q_BTV = torch.stack(probabilities, 1) if probabilities else None
    return torch.cat(tokens, 1), torch.stack(bests, 1), q_BTV
