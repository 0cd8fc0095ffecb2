"""Entries that are chosen again while a text grows, by what the target attends to in its verification.

After every n rounds the chunks of the prefix are ranked anew, by the last round's tokens that stand: the
queries of the target's last layer at them, as at the prefix's end those of its last tokens. Other entries
then take the slots of the kept ones, as many; what the drafter has stored of the continuation stays. For that
all of the drafter's prefix KV are held aside: what is saved is its reading, not its memory.

Replay goes the same way: `decode/replay.py`, `refreshed_rounds`.

Shape legend: B rows, C chunks of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels import dispatch
from kernels.reference import CHUNK, ranked
from pipeline.axes import View
from pipeline.kv.slot_cache import SlotCache
from pipeline.kv.views import PrefixView


def chunk_shares(cache: SlotCache, row: int, step: int, count: int) -> Tensor:
    """[1, C] of the prefix's chunks in what `count` continuation tokens attend to, from number `step` on."""
    assert cache.asked is not None
    prefix = int(cache.kept_B[row])  # a target keeps all
    queries = cache.asked[row : row + 1, step : step + count].transpose(1, 2)
    keys = cache.keys[-1][row : row + 1, :, : prefix + step + count]
    shares = dispatch.chunk_attention(queries.unflatten(1, (keys.shape[1], -1)), keys, 1.0)
    return shares[:, : prefix // CHUNK]


def chosen(whole: PrefixView, view: View, shares_1C: Tensor, frequencies: Tensor | None) -> PrefixView:
    """What a view keeps of a whole prefix by these shares."""
    cut = PrefixView(view, whole.prefix_tokens, guide=ranked(shares_1C))
    for keys, values in whole.layers:
        cut.cut(keys, values, keys[:, :, :0].unsqueeze(2), frequencies)
    return cut


class Refresh:
    """Chooses again, in the cache of a drafter that decodes.

    Args:
        target: the cache of the target, which notes its queries.
        wholes: all of the drafter's prefix KV, of each row.
        view: which entries are kept, and after how many rounds they are chosen again.
        frequencies: as `positions.frequencies_of` gives them for the drafter.
    """

    def __init__(
        self,
        target: SlotCache,
        drafter: SlotCache,
        wholes: Sequence[PrefixView],
        view: View,
        frequencies: Tensor | None,
    ) -> None:
        self.target, self.drafter, self.wholes = target, drafter, wholes
        self.view, self.frequencies, self.rounds = view, frequencies, 0

    def observe(self, accepted_B: Tensor, step_B: Tensor) -> None:
        """Hear of a round that verified from continuation token `step_B` on."""
        assert self.view.refresh
        self.rounds += 1
        if self.rounds % self.view.refresh:
            return
        for row, (accepted, step) in enumerate(zip(accepted_B.tolist(), step_B.tolist(), strict=True)):
            shares_1C = chunk_shares(self.target, row, step, accepted + 1)
            self.drafter.exchange(row, chosen(self.wholes[row], self.view, shares_1C, self.frequencies))
