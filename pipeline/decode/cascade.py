"""A cascade of three models (TriForce, arXiv 2404.11912): a small drafter drafts for the middle, which is the
target behind a sparse view, and the middle drafts for the target.

The γ proposals of a round come from speculation within it: the drafter proposes a few tokens, the middle
verifies them, and again, until there are γ; what is beyond is thrown away. Inner speculation is lossless, so
the proposals are what the middle alone would have proposed: greedily its own text, token for token, and when
sampling draws from its own law, each with the middle's whole distribution at its drawing. Acceptance is
therefore that of self-speculation, and so is its replay. Cutting at γ does not depend on which tokens came.

Both caches hold the continuation as their own model reads it behind its own view. TriForce puts the target's
continuation KV into the middle's cache after each verification; here the middle keeps its own, which differ
behind a sparse view, so that it is the drafter of self-speculation that replay knows.

Shape legend: B rows, Q tokens not read yet, T tokens of an inner round, T1 is T + 1, N slots for the last
token of the text and what is proposed behind it, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.decode.model import DecodeModel
from pipeline.decode.runner import Runner
from pipeline.decode.sampling import Rule, Sampler
from pipeline.decode.sources import DraftSource, Proposals
from pipeline.kv.slot_cache import SlotCache


def verify_inner(
    model: DecodeModel,
    cache: SlotCache,
    rule: Rule,
    unread_BQ: Tensor,
    draft_BT: Tensor,
    step_B: Tensor,
    best_BT: Tensor,
    q_BTV: Tensor | None,
    uniforms_BT1: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Read Q tokens, the first being continuation token `step_B`, and T proposals in one pass, and accept.

    Returns:
        The accepted proposals with the model's own token behind them [B, T1], and how many these are [B];
        what comes after them in a row is no text. Of all T1 the model's best logits, NaN where a logit of
        either model is not finite, and when sampling its probabilities [B, T1, V].
    """
    T = draft_BT.shape[1]
    hidden = model.hidden(torch.cat([unread_BQ, draft_BT], 1), step_B, cache)
    logits_BT1V = model.logits(hidden[:, -(T + 1) :])
    lengths_B = torch.full_like(step_B, T)
    accepted_B, next_B = rule.accept(draft_BT, q_BTV, logits_BT1V, uniforms_BT1, lengths_B, cache.backend)
    next_B1 = next_B.clamp_min(0).unsqueeze(1)  # -1 where nothing could be drawn
    made_BT1 = torch.cat([draft_BT, next_B1], 1).scatter(1, accepted_B.unsqueeze(1), next_B1)
    broken_B1 = ~best_BT.isfinite().all(1, keepdim=True)
    best_BT1 = logits_BT1V.amax(-1).float().masked_fill(broken_B1, torch.nan)
    return made_BT1, accepted_B + 1, best_BT1, None if rule.greedy else rule.probabilities(logits_BT1V)


def read(
    model: DecodeModel, cache: SlotCache, rule: Rule, tokens_BQ: Tensor, step_B: Tensor
) -> tuple[Tensor]:
    """Read Q tokens, the first being continuation token `step_B`; returns the number [B] of what follows."""
    model.hidden(tokens_BQ, step_B, cache)
    return (step_B + tokens_BQ.shape[1],)


class CascadeDrafts(DraftSource):
    """A drafter and the middle, each behind its view of the prompts.

    Args:
        inner_gamma: T, proposals of the drafter in an inner round. Both caches need room for so many tokens
            beyond what the other sources need.
    """

    name = "cascade"

    def __init__(self, drafter: Runner, middle: Runner, inner_gamma: int) -> None:
        self.drafter, self.middle, self.inner_gamma = drafter, middle, inner_gamma

    def check_room(self, needed: int) -> None:
        for runner in (self.drafter, self.middle):
            runner.cache.check_room(needed + self.inner_gamma)

    def propose(
        self, sampler: Sampler, gamma: int, unread_BQ: Tensor, step_B: Tensor, open_rows: Sequence[bool]
    ) -> Proposals:
        """γ proposals a row; the host waits for the device after every inner round."""
        rule, T = sampler.rule, self.inner_gamma
        rows_B1, last_B = self.middle.cache.rows_B1, step_B + unread_BQ.shape[1] - 1
        along_N = torch.arange(gamma + T + 2, device=step_B.device)
        chain_BN = unread_BQ[:, -1:].repeat(1, len(along_N))  # the text's last token, then proposals
        best_BN = torch.zeros(chain_BN.shape, device=step_B.device)
        q_BNV = None if rule.greedy else best_BN.new_zeros(*chain_BN.shape, self.middle.model.num_tokens)
        count_B = torch.zeros_like(step_B)
        # Drawn beforehand for as many inner rounds as there can be: a row's numbers depend on no other row.
        uniforms_BK = sampler.uniforms(gamma * (2 * T + 1))
        uniforms = [None] * gamma if uniforms_BK is None else uniforms_BK.split(2 * T + 1, 1)
        for drawn in uniforms:
            # Contiguous, as other sources' are: compiled steps are then shared with them.
            drafting_TB = None if drawn is None else drawn[:, :T].T.contiguous()
            verifying_BT1 = None if drawn is None else drawn[:, T:].contiguous()
            draft_BT, *beside = self.drafter.draft(rule, T, unread_BQ, step_B, drafting_TB)
            given = (unread_BQ, draft_BT, step_B, *beside, verifying_BT1)
            made_BT1, emitted_B, best_BT1, q_BT1V = self.middle.run(verify_inner, rule, given)
            at_BT1 = count_B.unsqueeze(1) + along_N[1 : T + 2]
            chain_BN[rows_B1, at_BT1], best_BN[rows_B1, at_BT1] = made_BT1, best_BT1
            if q_BNV is not None:
                q_BNV[rows_B1, at_BT1] = q_BT1V
            # Rows that have γ proposals idle at the last of them, and write behind it what nobody reads.
            count_B = (count_B + emitted_B).clamp_max(gamma)
            unread_BQ = chain_BN[rows_B1, count_B.unsqueeze(1) - 1 + along_N[:2]]
            step_B = last_B + count_B - 1
            waiting = zip(count_B.tolist(), open_rows, strict=True)
            if not any(is_open and count < gamma for count, is_open in waiting):
                break
        # Where the drafter's last proposal was accepted as the one before the γ-th, it has not read it yet.
        self.drafter.run(read, rule, (unread_BQ, step_B))
        proposed = slice(1, gamma + 1)
        probabilities_BTV = None if q_BNV is None else q_BNV[:, proposed].contiguous()
        return Proposals(
            chain_BN[:, proposed].contiguous(), best_BN[:, proposed].contiguous(), probabilities_BTV
        )
