"""Torch oracles of what the kernels compute: used by the tests, the benchmarks and the CPU path.

Shape legend: B batch rows, H key/value heads, G query heads per key/value head, S prefix length, N kept
entries, C = S // 8 chunks, W last tokens, D head width, T positions, V vocabulary, K stored label entries.
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
    num_chunks = S // CHUNK
    means_BHCD = keys_BHSD[:, :, : num_chunks * CHUNK].float().reshape(B, H, num_chunks, CHUNK, D).mean(3)
    scores_BHC = (means_BHCD @ keys_BHSD[:, :, -1].float().unsqueeze(-1)).squeeze(-1)
    return kept_chunks(ranked(scores_BHC), S, budget, keep_tail)


def ranked(scores: Tensor) -> Tensor:
    """Chunks [..., C] by their scores: chunk 0, then the best first, ties going to the lower index."""
    scores = torch.cat([torch.full_like(scores[..., :1], torch.inf), scores[..., 1:]], dim=-1)
    return scores.sort(dim=-1, descending=True, stable=True).indices


def kept_chunks(ranked: Tensor, prefix_tokens: int, budget: int, keep_tail: bool = True) -> Tensor:
    """Entries [..., N], ascending: the first of ranked chunks, as many as the budget holds, and the tail."""
    num_chunks, tail = divmod(prefix_tokens, CHUNK)
    kept_tail = tail if keep_tail else 0
    num_kept = min((budget - kept_tail) // CHUNK, num_chunks)
    best = ranked[..., :num_kept].sort(-1).values
    chunks = (best.unsqueeze(-1) * CHUNK + torch.arange(CHUNK, device=ranked.device)).flatten(-2)
    rest = torch.arange(prefix_tokens - kept_tail, prefix_tokens, device=ranked.device)
    return torch.cat([chunks, rest.expand(*ranked.shape[:-1], kept_tail)], dim=-1)


def chunk_attention(queries_BHGWD: Tensor, keys_BHSD: Tensor, scaling: float) -> Tensor:
    """How much of the attention of the last W of S tokens falls on each whole chunk of 8 of them, [B, C].

    The mean over the queries, each of which sees itself and what is before it, and over all query heads, in
    fp32: the shares of all chunks and of the tail of S mod 8 tokens make 1.
    """
    S, W = keys_BHSD.shape[2], queries_BHGWD.shape[3]
    logits_BHMS = queries_BHGWD.flatten(2, 3).float() @ keys_BHSD.float().transpose(-1, -2) * scaling
    future_WS = torch.ones(W, S, dtype=torch.bool, device=keys_BHSD.device).triu(S - W + 1)
    logits_BHGWS = logits_BHMS.unflatten(2, (-1, W)).masked_fill(future_WS, -torch.inf)
    shares_BS = logits_BHGWS.softmax(-1).mean((1, 2, 3))
    return shares_BS[:, : S - S % CHUNK].unflatten(-1, (-1, CHUNK)).sum(-1)


def greedy_accept(
    draft_BT: Tensor, target_BT1: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Proposals [B] before the first that differs from the target's arg-max, and that arg-max [B].

    Args:
        draft_BT: [B, T] proposed tokens.
        target_BT1: [B, T + 1] the target's arg-max before each proposal and after the last.
        lengths_B: proposals of each round; all T if None.
    """
    stands_BT = (draft_BT == target_BT1[:, :-1]) & _inside(draft_BT, lengths_B)
    accepted_B = stands_BT.long().cumprod(1).sum(1)
    return accepted_B, target_BT1.gather(1, accepted_B.unsqueeze(1)).squeeze(1)


def rejection_accept(
    draft_BT: Tensor, q_BTV: Tensor, p_BT1V: Tensor, uniforms_BT1: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rejection sampling of B rounds; the emitted tokens are distributed as the target's (Leviathan et al.).

    Proposal x at t stands where u[t] · q[t, x] < p[t, x]. At the first that does not, the next token is drawn
    from the positive part of p - q, and from p after the last. Only rounding can leave no positive part (the
    rejected proposal's q exceeds its p, and both rows sum to 1): then the draw is from p.

    Args:
        draft_BT: [B, T] proposals, drawn from `q_BTV` [B, T, V], the drafter's probabilities.
        p_BT1V: [B, T + 1, V] the target's probabilities.
        uniforms_BT1: [B, T + 1] in [0, 1): one a proposal; the last draws the next token.
        lengths_B: proposals of each round; all T if None.

    Returns:
        The accepted proposals [B] and the tokens after them [B]; see `draw` for -1.
    """
    B, T = draft_BT.shape
    q_BT = q_BTV.gather(2, draft_BT.unsqueeze(2)).squeeze(2).double()
    p_BT = p_BT1V[:, :T].gather(2, draft_BT.unsqueeze(2)).squeeze(2).double()
    stands_BT = (uniforms_BT1[:, :T].double() * q_BT < p_BT) & _inside(draft_BT, lengths_B)
    accepted_B = stands_BT.long().cumprod(1).sum(1)
    row_B = torch.arange(B, device=draft_BT.device)
    p_BV = p_BT1V[row_B, accepted_B].double()
    if T == 0:
        return accepted_B, draw(p_BV, uniforms_BT1[:, -1])
    rejected_B = accepted_B < (T if lengths_B is None else lengths_B)
    rest_BV = (p_BV - q_BTV[row_B, accepted_B.clamp(max=T - 1)].double()).clamp_min(0)
    from_rest_B = rejected_B & (rest_BV.sum(-1) != 0)
    return accepted_B, draw(torch.where(from_rest_B.unsqueeze(1), rest_BV, p_BV), uniforms_BT1[:, -1])


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """[B] tokens drawn by weight: the first whose cumulative sum exceeds its uniform number times the total.

    -1 for a row without a positive weight, or with NaN.
    """
    sums_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    above_BV = (sums_BV > uniform_B.unsqueeze(1) * sums_BV[:, -1:]) & (weights_BV > 0)
    return torch.where(sums_BV[:, -1] > 0, above_BV.long().argmax(-1), -1)


def _inside(draft_BT: Tensor, lengths_B: Tensor | None) -> Tensor:
    position_1T = torch.arange(draft_BT.shape[1], device=draft_BT.device).unsqueeze(0)
    return position_1T < (draft_BT.shape[1] if lengths_B is None else lengths_B.unsqueeze(1))


def cross_entropy(logits_TV: Tensor, argmax_T: Tensor) -> Tensor:
    """[T] cross entropy of the drafter against the target's arg-max."""
    return torch.nn.functional.cross_entropy(logits_TV.float(), argmax_T, reduction="none")


def _with_tail(log_probs_TK: Tensor) -> Tensor:
    """Append the log-probability of everything that is not listed: [T, K] → [T, K + 1]."""
    tail_T1 = (1 - log_probs_TK.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([log_probs_TK, tail_T1], dim=-1)


def bucketed_kl(log_q_TK: Tensor, log_p_TK: Tensor, inside_TK: Tensor | None = None) -> Tensor:
    """[T] KL(p ‖ q) from the log-probabilities of K entries; all others share one bucket.

    Args:
        inside_TK: which of them q can give, where it has a draft vocabulary. Then it is p(V_d) times the
            divergence of q from p renormalised on V_d, in which the tail of p is taken to lie.
    """
    log_q, log_p, inside = _buckets(log_q_TK, log_p_TK, inside_TK)
    divergence_T = (inside * log_p.exp() * (log_p - log_q)).sum(-1)
    if inside_TK is None:
        return divergence_T
    mass_T = (inside * log_p.exp()).sum(-1)
    return divergence_T - mass_T * mass_T.log()


def bucketed_total_variation(log_q_TK: Tensor, log_p_TK: Tensor, inside_TK: Tensor | None = None) -> Tensor:
    """[T] 1 - Σ min(p, q) from the log-probabilities of K entries; all others share one bucket.

    Args:
        inside_TK: as of `bucketed_kl`; p stays a distribution over the whole vocabulary.
    """
    log_q, log_p, inside = _buckets(log_q_TK, log_p_TK, inside_TK)
    return 1 - (inside * torch.minimum(log_q.exp(), log_p.exp())).sum(-1)


def _buckets(
    log_q_TK: Tensor, log_p_TK: Tensor, inside_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Both with the bucket of what is not listed, [T, K + 1], and which of these q can give.

    What q gives to entries outside its vocabulary is of other tokens, and falls into its bucket.
    """
    if inside_TK is None:
        return _with_tail(log_q_TK), _with_tail(log_p_TK.float()), 1.0
    log_q_TK = log_q_TK.masked_fill(~inside_TK, -80.0)  # nothing, and still a number
    inside_TK1 = torch.nn.functional.pad(inside_TK, (0, 1), value=True)
    return _with_tail(log_q_TK), _with_tail(log_p_TK.float()), inside_TK1.float()


def _listed(logits_TV: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    return (logits_TV.float() / temperature).log_softmax(-1).gather(-1, ids_TK)


def kl(
    logits_TV: Tensor,
    ids_TK: Tensor,
    log_p_TK: Tensor,
    temperature: float,
    inside_TK: Tensor | None = None,
) -> Tensor:
    """[T] KL(p ‖ q) over the K stored entries and one bucket for the tail: a lower bound of the true one.

    With `inside_TK` it is an estimate: see `bucketed_kl`.
    """
    return bucketed_kl(_listed(logits_TV, ids_TK, temperature), log_p_TK, inside_TK)


def total_variation(
    logits_TV: Tensor,
    ids_TK: Tensor,
    log_p_TK: Tensor,
    temperature: float,
    inside_TK: Tensor | None = None,
) -> Tensor:
    """[T] 1 - Σ min(p, q) over the K stored entries and the tail's bucket: a lower bound of the true one."""
    return bucketed_total_variation(_listed(logits_TV, ids_TK, temperature), log_p_TK, inside_TK)


def chunk_select(
    keys_BHSD: Tensor, values_BHSD: Tensor, budget: int, keep_tail: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept keys and values [B, H, N, D] of `chunk_topk`, and their indices [B, H, N]."""
    indices_BHN = chunk_topk(keys_BHSD, budget, keep_tail)
    index = indices_BHN.unsqueeze(-1).expand(-1, -1, -1, keys_BHSD.shape[-1])
    return keys_BHSD.gather(2, index), values_BHSD.gather(2, index), indices_BHN


def verify_attention(
    query: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    scaling: float,
    length: int | Tensor,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Attention of the last Q of the first `length` stored tokens; each sees itself and all before it.

    What lies in the buffers beyond `length` is not read. A query that sees nothing (its place is before the
    first token) gives zeros.

    Args:
        query: [B, H·G, Q, D], the query heads of one key/value head side by side.
        length: tokens stored, at most S: an int, a 0-d tensor, or [B] for rows of different lengths.
        window: of these a query sees the first `window[0]` and its own last `window[1]`.

    Returns:
        [B, H·G, Q, D] in the type of `query`; computed in fp32.
    """
    B, heads, Q, _ = query.shape
    H, S = key_BHSD.shape[1], key_BHSD.shape[2]
    length_B = torch.as_tensor(length, device=query.device).expand(B)
    position = torch.arange(S, device=query.device)
    last_BQ = length_B.unsqueeze(1) - Q + torch.arange(Q, device=query.device)
    hidden_BQS = position > last_BQ.unsqueeze(-1)
    if window is not None:
        sinks, recent = window
        hidden_BQS |= (position >= sinks) & (position <= last_BQ.unsqueeze(-1) - recent)
    stored_BS = position < length_B.unsqueeze(1)
    key = key_BHSD.float().repeat_interleave(heads // H, dim=1)
    value = value_BHSD.float().masked_fill(~stored_BS[:, None, :, None], 0.0)
    value = value.repeat_interleave(heads // H, dim=1)
    logits = (query.float() @ key.transpose(-1, -2) * scaling).masked_fill(hidden_BQS[:, None], -torch.inf)
    weights = logits.softmax(-1).masked_fill(hidden_BQS[:, None], 0.0)
    return (weights @ value).to(query.dtype)
