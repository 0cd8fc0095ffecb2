"""What training reads: memory-mapped shards, and batches that are a function of (seed, step) alone.

Because nothing about a batch depends on what ran before, a resumed run needs only its step number, and the
number of workers changes who computes a micro-batch, never what is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.train import Train, Variant
from pipeline.errors import BadData
from pipeline.kv.guides import UNGUIDED, Guides
from pipeline.train.losses import TargetLabels

PHASES = 4  # places in a window where windows may start; a fifth if the first start is none of them
# On a CPU oneDNN compiles a bfloat16 product for every new shape and keeps the last 1024 of them. Measured on
# drafters of 64 and 128 channels: about ten new products a micro-batch until each prefix length that windows
# have was met, three products a length, .76 and 1.05 MiB each; none in fp32.
PRODUCT_BYTES, MOST_PRODUCTS, NEW_PRODUCTS, PRODUCTS_A_LENGTH = int(0.9 * 2**20), 1024, 10, 3


class Shards:
    """Rows of equally shaped `.npy` files, read as one memory-mapped array."""

    def __init__(self, files: Sequence[Path]) -> None:
        if not files:
            raise BadData(
                "there are no training sequences: the training split is empty or its documents short"
            )
        self.arrays = [np.load(file, mmap_mode="r") for file in files]
        self.offsets = np.cumsum([0, *(len(array) for array in self.arrays)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def rows(self, indices: Sequence[int]) -> Tensor:
        """The rows [B, …] at these indices; integers as int64, floats as float32."""
        picked = []
        for index in indices:
            shard = int(np.searchsorted(self.offsets, index, side="right")) - 1
            picked.append(self.arrays[shard][index - self.offsets[shard]])
        stacked = np.stack(picked)
        return torch.from_numpy(stacked.astype(np.int64 if stacked.dtype.kind in "ui" else np.float32))


class LabelledSequences:
    """Sequences with the target's labels, and prompts with its answers, as stage teach stores them."""

    def __init__(self, folder: Path, temperature: float) -> None:
        self.chosen: np.ndarray | None = None
        self.tokens = Shards(sorted(folder.glob("*.tokens.npy")))
        self.argmax = Shards(sorted(folder.glob("*.argmax.npy")))
        ids = sorted(folder.glob("*.ids.npy"))
        self.ids = Shards(ids) if ids else None
        self.log_probs = Shards(sorted(folder.glob("*.log_probs.npy"))) if ids else None
        self.temperature = temperature
        guides = sorted(folder.glob("*.guide.npy"))
        self.guides = Shards(guides) if guides else None
        # Of an answer, the tokens of its prompt and the labels that are learned from; of a text -1.
        self.prefix, self.supervised = (
            np.concatenate([of_answers(array, name) for array in self.tokens.arrays])
            for name in ("prefix", "supervised")
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def among(self, chosen: np.ndarray) -> LabelledSequences:
        """The same answers, learned from at those of their labels alone that are chosen, [N, A]."""
        narrower = copy.copy(self)
        narrower.chosen = chosen
        return narrower

    @property
    def has_answers(self) -> bool:
        return bool((self.prefix >= 0).any())

    def counts(self, num_tokens: int) -> np.ndarray:
        """[V] how often each token is the target's arg-max, of answers where they are learned from."""
        counts, first = np.zeros(num_tokens, dtype=np.int64), 0
        for array in self.argmax.arrays:
            supervised = self.supervised[first : first + len(array), None]
            learned = (supervised < 0) | (np.arange(array.shape[1]) < supervised)
            counts += np.bincount(array[learned], minlength=num_tokens)
            first += len(array)
        return counts


def of_answers(tokens: np.memmap, name: str) -> np.ndarray:
    """A number for each row of a shard of answers, int64; of a shard of texts -1."""
    stored = Path(str(tokens.filename))
    file = stored.with_name(stored.name.replace(".tokens.", f".{name}."))
    return np.load(file).astype(np.int64) if file.exists() else np.full(len(tokens), -1)


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_indices(count: int, batch: int, seed: int, step: int) -> list[int]:
    """The sequences of one optimizer step: consecutive entries of an endless, reshuffled pass."""
    first, indices = step * batch, []
    epoch, order = -1, np.empty(0, dtype=int)
    for position in range(first, first + batch):
        if position // count != epoch:
            epoch = position // count
            order = epoch_order(count, seed, epoch)
        indices.append(int(order[position % count]))
    return indices


def window_starts(train: Train, sequence_tokens: int) -> list[int]:
    """All places where windows of a sequence may start, ascending."""
    C, least = train.window_tokens, train.min_prefix_tokens
    last = [sequence_tokens - phase - C for phase in start_phases(train, sequence_tokens)]
    return sorted({start for first in last for start in range(first, least - 1, -C)})


@dataclass(frozen=True)
class Draw:
    """The random choices of one micro-batch: where its windows start, how often each budget was drawn, and by
    how many positions the sinks are moved back."""

    starts: tuple[int, ...]
    budgets: dict[int, int]
    offset: int = 0


def start_phases(train: Train, sequence_tokens: int) -> list[int]:
    """How far from the end of a sequence, modulo the window length, windows may end.

    The first and the last possible start are among them, so that every position behind the shortest prefix
    is trained.
    """
    slack = sequence_tokens - train.min_prefix_tokens - train.learned_tokens
    quarter = -(-train.window_tokens // PHASES)
    return sorted({slack % train.window_tokens, *range(0, min(slack, train.window_tokens - 1) + 1, quarter)})


def draw(
    variant: Variant,
    train: Train,
    sequence_tokens: int,
    seed: int,
    step: int,
    micro: int,
    on_policy: bool = False,
) -> Draw:
    """Non-overlapping windows and `num_views` budgets (weighted, with replacement) of one micro-batch.

    With `on_policy` the windows are the last ones of the sequence, which the target may have written itself.
    Else all window starts share their remainder modulo the window length, so that equal budgets keep equally
    many entries and can share one attention call. The remainder is one of few, at about every quarter of a
    window: a backend compiles, and keeps, something for every new prefix length. On a CPU in bfloat16 starts
    anywhere took three times the memory and a third more time.
    """
    rng = np.random.default_rng([seed, step, micro])
    C = train.window_tokens
    if on_policy:
        starts = last_starts(train, sequence_tokens)
        return Draw(starts, draw_budgets(variant, rng), draw_offset(variant, sequence_tokens, rng))
    # A start must leave the prefix long enough, and its window (inputs start .. start+C-1) inside.
    offset = int(rng.choice(start_phases(train, sequence_tokens)))
    places = (sequence_tokens - offset - train.min_prefix_tokens) // C
    chosen = np.sort(rng.choice(places, size=train.windows, replace=False))
    starts = tuple(int(sequence_tokens - offset - (place + 1) * C) for place in chosen)
    return Draw(starts, draw_budgets(variant, rng), draw_offset(variant, sequence_tokens, rng))


def last_starts(train: Train, sequence_tokens: int) -> tuple[int, ...]:
    """Where windows start that are the end of a sequence, the last first."""
    return tuple(sequence_tokens - (place + 1) * train.window_tokens for place in range(train.windows))


def largest(variant: Variant, train: Train, sequence_tokens: int) -> Draw:
    """The draw that takes the most memory."""
    budgets = sorted(variant.budgets, reverse=True)[: variant.num_views] if variant.sparse_weight else []
    return Draw(last_starts(train, sequence_tokens), dict.fromkeys(budgets, 1))


def product_bytes(train: Train, steps: int, sequence_tokens: int) -> int:
    """What oneDNN keeps of the bfloat16 products of so many steps, on a CPU."""
    lengths = len(start_phases(train, sequence_tokens)) * (sequence_tokens - train.min_prefix_tokens)
    met = NEW_PRODUCTS * steps * train.batch_sequences // train.micro_batch_sequences
    return PRODUCT_BYTES * min(met, PRODUCTS_A_LENGTH * (lengths // train.window_tokens), MOST_PRODUCTS)


def draw_budgets(variant: Variant, rng: np.random.Generator) -> dict[int, int]:
    """Budget → how often it was drawn; empty where there is no sparse branch."""
    counts: dict[int, int] = {}
    if variant.sparse_weight > 0:
        # Sorted: a config that lists the same budgets in another order has the same fingerprint.
        budgets, weights = zip(*sorted(variant.budgets.items()), strict=True)
        drawn = rng.choice(budgets, size=variant.num_views, p=np.array(weights) / sum(weights))
        for budget in sorted(drawn.tolist(), reverse=True):
            counts[budget] = counts.get(budget, 0) + 1
    return counts


def draw_offset(variant: Variant, sequence_tokens: int, rng: np.random.Generator) -> int:
    """Up to what makes of a sequence a text of the length that the drafter is to serve."""
    if variant.served_tokens is None:
        return 0
    return int(rng.integers(0, variant.served_tokens - sequence_tokens, endpoint=True))


@dataclass(frozen=True)
class Windows:
    """Windows of some rows, to be read together: each starts at the same tokens of all of these rows.

    `learned` [windows · rows · C] (windows outermost) says which positions count; None is all of them.
    """

    rows: list[int]
    starts: tuple[int, ...]
    learned: Tensor | None = None


def answer_starts(train: Train, prefix: int) -> list[int]:
    """Where windows of an answer may start, behind a prompt of so many tokens."""
    return list(range(prefix, prefix + train.learned_tokens, train.window_tokens))


def windows_of(data: LabelledSequences, rows: Sequence[int], drawn: Draw, train: Train) -> list[Windows]:
    """The windows of a micro-batch: those that were drawn, and of answers all that have labels.

    Where answers are about, every row is read alone. So every worker makes as many forward passes as the
    others, which ZeRO-3 counts on, whatever the lengths of its prompts.
    """
    if not data.has_answers:
        return [Windows(list(rows), drawn.starts)]
    C, groups = train.window_tokens, []
    for row in rows:
        prefix, supervised = int(data.prefix[row]), int(data.supervised[row])
        if prefix < 0:
            groups.append(Windows([row], drawn.starts))
            continue
        starts = tuple(start for start in answer_starts(train, prefix) if start < prefix + supervised)
        learned = torch.arange(len(starts) * C) < supervised
        if data.chosen is not None:
            learned[:supervised] &= torch.from_numpy(data.chosen[row, :supervised])
        groups.append(Windows([row], starts, learned))
    return groups


def window_guides(data: LabelledSequences, windows: Windows, train: Train, device: torch.device) -> Guides:
    """The target's guide at the start of each window, of all rows; none where stage teach has stored none."""
    if data.guides is None:
        return UNGUIDED
    ranked_BPR, prefix = data.guides.rows(windows.rows).to(device), int(data.prefix[windows.rows[0]])
    known = answer_starts(train, prefix)
    if prefix < 0:
        known = window_starts(train, data.tokens.arrays[0].shape[1])
    return {start: ranked_BPR[:, known.index(start)] for start in windows.starts}


def window_labels(
    data: LabelledSequences, windows: Windows, length: int, device: torch.device
) -> TargetLabels:
    """Labels of all windows, flattened as [windows · rows · C] (windows outermost).

    Of answers they begin behind the prompt, and what lies beyond the last is repeated from it.
    """
    first = max(0, int(data.prefix[windows.rows[0]]))

    def cut(shards: Shards) -> Tensor:
        labels = shards.rows(windows.rows).to(device)
        places = [torch.arange(start - first, start - first + length) for start in windows.starts]
        return torch.cat([labels[:, place.clamp_max(labels.shape[1] - 1)].flatten(0, 1) for place in places])

    return TargetLabels(
        cut(data.argmax),
        cut(data.ids) if data.ids else None,
        cut(data.log_probs) if data.log_probs else None,
        data.temperature,
    )
