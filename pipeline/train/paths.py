"""The path term: the likelihood of what the drafter samples, weighted by how much of it the target accepts.

After variational speculative decoding (arXiv 2602.05774). From the start of every window of a micro-batch S
paths of γ tokens are sampled from the drafter behind one view; the target says what it makes of them:

    a_s = Σ_i Π_{j ≤ i} min(1, p(x_j) ÷ q(x_j))       tokens of path s that are accepted, in expectation
    w_s = a_s ÷ Σ_s a_s                               no gradient goes through it
    term = - Σ_s w_s · log q(path s) ÷ γ + κ · mean KL(p ‖ q) along the paths

p and q are the target's and the drafter's probabilities at the term's temperature, behind the whole prefix
and behind the view. What follows the end of a text counts as nothing. With a draft vocabulary p stays a
distribution over all tokens, and KL is p(V_d) times the divergence from p renormalised on V_d.

The target is whole in every training worker. It reads the prefixes once a term, and the S paths one after
another behind that, so that its cache is held for one path a window at a time.

Shape legend: B rows, S a prefix's tokens, W windows, N = W·B starts, P paths of a start, R = P·N, T tokens of
a path, D tokens that the drafter can propose, V all tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.axes import FULL
from pipeline.config.train import Paths
from pipeline.decode.model import DecodeModel
from pipeline.decode.sampling import Rule
from pipeline.kv.slot_cache import SlotCache, slots_for
from pipeline.train.windows import read_for

STREAM = 1  # of a micro-batch's random numbers; those that draw its windows have none beside step and number


class PathTerm:
    """The term of one variant.

    Args:
        ends: the tokens that end a text.
    """

    def __init__(self, spec: Paths, target: DecodeModel, ends: Collection[int]) -> None:
        self.spec, self.target = spec, target
        self.ends_E = torch.tensor(sorted(ends), dtype=torch.long, device=target.geometry.device)
        self.rule = Rule(spec.temperature)

    def due(self, step: int) -> bool:
        return step % self.spec.every == 0

    def random(self, seed: int, step: int, micro: int) -> np.random.Generator:
        """What draws the view and the paths of a micro-batch."""
        return np.random.default_rng([seed, step, micro, STREAM])

    def losses(
        self,
        tokens_BS: Tensor,
        starts: Sequence[int],
        chosen_RT: Tensor,
        logits_RTD: Tensor,
        tokens_D: Tensor | None,
    ) -> Tensor:
        """The term [N] of each start, as `windows.sampled_paths` gives its paths."""
        paths_RT = chosen_RT if tokens_D is None else tokens_D[chosen_RT]
        log_p_RTD = (self.read(tokens_BS, starts, paths_RT) / self.spec.temperature).log_softmax(-1)
        if tokens_D is not None:
            log_p_RTD = log_p_RTD[..., tokens_D]
        log_q_RTD = (logits_RTD.float() / self.spec.temperature).log_softmax(-1)
        open_RT = still_open(paths_RT, self.ends_E)
        log_p_RT, log_q_RT = (
            log_RTD.gather(-1, chosen_RT.unsqueeze(-1)).squeeze(-1) for log_RTD in (log_p_RTD, log_q_RTD)
        )
        accepted_R = expected_accepted(log_p_RT, log_q_RT.detach(), open_RT)
        by_start = (self.spec.paths, -1)
        weights_PN = shares(accepted_R.unflatten(0, by_start))
        likelihood_PN = (open_RT * log_q_RT).sum(-1).unflatten(0, by_start) / self.spec.length
        kl_RT = open_RT * kl(log_p_RTD, log_q_RTD)
        kl_N = kl_RT.sum(-1).unflatten(0, by_start).sum(0) / open_RT.sum(-1).unflatten(0, by_start).sum(0)
        return self.spec.kl_weight * kl_N - (weights_PN * likelihood_PN).sum(0)

    @torch.no_grad()
    def read(self, tokens_BS: Tensor, starts: Sequence[int], paths_RT: Tensor) -> Tensor:
        """The target's logits [R, T, V] of each token of the paths, in its own precision."""
        B, T = len(tokens_BS), paths_RT.shape[1]
        with torch.autocast(tokens_BS.device.type, enabled=False):
            kept, _ = self.target.prefill(tokens_BS[:, : read_for(starts)], [(s, FULL) for s in starts])
            geometry, rotation = self.target.geometry, self.target.rotation
            cache = SlotCache(geometry, len(kept) * B, slots_for(max(starts)), T, rotation)
            for number, view in enumerate(kept):
                for row in range(B):
                    cache.load_row(number * B + row, view, row)
            first_N1 = torch.cat([tokens_BS[:, start : start + 1] for start in starts])
            begin_N = torch.zeros_like(first_N1[:, 0])
            found = []
            for path_NT in paths_RT.split(len(first_N1)):
                read_NT = torch.cat([first_N1, path_NT[:, :-1]], 1)
                found.append(self.target.logits(self.target.hidden(read_NT, begin_N, cache)).float())
        return torch.cat(found)


def still_open(paths_RT: Tensor, ends_E: Tensor) -> Tensor:
    """[R, T] which tokens of paths have no end of text before them."""
    ends_RT = torch.isin(paths_RT, ends_E).long()
    return ends_RT.cumsum(1) - ends_RT == 0


def expected_accepted(log_p_RT: Tensor, log_q_RT: Tensor, open_RT: Tensor) -> Tensor:
    """[R] how many tokens of each path rejection sampling accepts in expectation (Leviathan et al., 2023).

    Args:
        log_p_RT: the target's log-probability of each token, and `log_q_RT` the drafter's.
        open_RT: which tokens count.
    """
    reached_RT = (log_p_RT - log_q_RT).clamp_max(0).cumsum(1).exp()
    return (reached_RT * open_RT).sum(1)


def shares(accepted_PN: Tensor) -> Tensor:
    """[P, N] the weight of each path among those of its start; all 0 where nothing would be accepted."""
    return accepted_PN / accepted_PN.sum(0).clamp_min(torch.finfo(accepted_PN.dtype).tiny)


def kl(log_p_RTD: Tensor, log_q_RTD: Tensor) -> Tensor:
    """[R, T] KL(p ‖ q); where p is less than whole, its mass times the divergence from p renormalised."""
    p_RTD = log_p_RTD.exp()
    mass_RT = p_RTD.sum(-1)
    return (torch.xlogy(p_RTD, p_RTD) - p_RTD * log_q_RTD).sum(-1) - torch.xlogy(mass_RT, mass_RT)
