"""Torch oracles of what the kernels compute: used by the tests, the benchmarks and the CPU path.

Shape legend: B batch rows, H key/value heads, G query heads per key/value head, S prefix length, N kept
entries, D head width, T positions, V vocabulary, K stored label entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8


def chunk_topk(keys_BHSD: Tensor, budget: int, keep_tail: bool = True) -> Tensor:
    """Prefix entries that `chunk_topk` keeps (paper section 3), as ascending indices [B, H, N], N <= budget.

    The prefix is cut into chunks of 8 keys. A chunk scores the dot product of the last prefix key with the
    chunk's mean key. Chunk 0 and the best others are kept, ties going to the lower index. The last S mod 8
    keys, which fill no chunk, are kept and count towards the budget; with `keep_tail=False` they are
    dropped, as the paper's code does.
    """
    B, H, S, D = keys_BHSD.shape
    num_chunks, tail = divmod(S, CHUNK)
    kept_tail = tail if keep_tail else 0
    num_kept = min((budget - kept_tail) // CHUNK, num_chunks)
    means_BHCD = keys_BHSD[:, :, : num_chunks * CHUNK].float().reshape(B, H, num_chunks, CHUNK, D).mean(3)
    scores_BHC = (means_BHCD @ keys_BHSD[:, :, -1].float().unsqueeze(-1)).squeeze(-1)
    scores_BHC[:, :, 0] = torch.inf
    best_BHC = scores_BHC.sort(dim=-1, descending=True, stable=True).indices[:, :, :num_kept].sort(-1).values
    offsets = torch.arange(CHUNK, device=keys_BHSD.device)
    chunks_BHN = (best_BHC.unsqueeze(-1) * CHUNK + offsets).flatten(2)
    tail_BHN = torch.arange(S - kept_tail, S, device=keys_BHSD.device).expand(B, H, kept_tail)
    return torch.cat([chunks_BHN, tail_BHN], dim=-1)


def greedy_accept(draft_T: Tensor, target_T1: Tensor) -> Tensor:
    """Number of draft tokens that equal the target's arg-max up to the first difference (0-d tensor).

    Args:
        draft_T: [T] proposed tokens.
        target_T1: [T + 1] the target's arg-max before each proposal and after the last.
    """
    return (draft_T == target_T1[:-1]).long().cumprod(0).sum()


def rejection_accept(
    draft_T: Tensor, q_TV: Tensor, p_T1V: Tensor, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Rejection sampling of one round; the emitted tokens are distributed as the target's (Leviathan et al.).

    Proposal t is accepted with probability min(1, p/q). At the first rejection the token is drawn from the
    normalised positive part of p - q; if nothing is rejected, the bonus token is drawn from p.

    Args:
        draft_T: [T] proposed tokens, drawn from `q_TV`.
        q_TV: [T, V] the drafter's probabilities.
        p_T1V: [T + 1, V] the target's probabilities.

    Returns:
        The number of accepted proposals and the token after them.
    """
    num_draft = draft_T.shape[0]
    position = torch.arange(num_draft, device=draft_T.device)
    ratio_T = p_T1V[position, draft_T] / q_TV[position, draft_T]
    uniform_T = torch.rand(num_draft, generator=generator, device=draft_T.device)
    accepted = int((uniform_T < ratio_T).long().cumprod(0).sum())
    next_V = p_T1V[accepted]
    if accepted < num_draft:
        next_V = (next_V - q_TV[accepted]).clamp_min(0)
    return accepted, int(torch.multinomial(next_V, 1, generator=generator))


def cross_entropy(logits_TV: Tensor, argmax_T: Tensor) -> Tensor:
    """[T] cross entropy of the drafter against the target's arg-max."""
    return torch.nn.functional.cross_entropy(logits_TV.float(), argmax_T, reduction="none")


def _with_tail(log_probs_TK: Tensor) -> Tensor:
    """Append the log-probability of everything that is not listed: [T, K] → [T, K + 1]."""
    tail_T1 = (1 - log_probs_TK.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([log_probs_TK, tail_T1], dim=-1)


def _bucketed(
    logits_TV: Tensor, ids_TK: Tensor, log_p_TK: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_q_TV = (logits_TV.float() / temperature).log_softmax(-1)
    return _with_tail(log_q_TV.gather(-1, ids_TK)), _with_tail(log_p_TK.float())


def kl(logits_TV: Tensor, ids_TK: Tensor, log_p_TK: Tensor, temperature: float) -> Tensor:
    """[T] KL(p ‖ q) over the K stored entries and one bucket for the tail: a lower bound of the true one."""
    log_q, log_p = _bucketed(logits_TV, ids_TK, log_p_TK, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def total_variation(logits_TV: Tensor, ids_TK: Tensor, log_p_TK: Tensor, temperature: float) -> Tensor:
    """[T] 1 - Σ min(p, q) over the K stored entries and the tail's bucket: a lower bound of the true one."""
    log_q, log_p = _bucketed(logits_TV, ids_TK, log_p_TK, temperature)
    return 1 - torch.minimum(log_q.exp(), log_p.exp()).sum(-1)
