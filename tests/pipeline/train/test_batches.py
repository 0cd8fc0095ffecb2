"""Batches are functions of (seed, step); windows and budgets are drawn as the config says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.train import Train, Variant
from pipeline.errors import BadData
from pipeline.train.batches import (
    PHASES,
    LabelledSequences,
    Shards,
    Windows,
    batch_indices,
    draw,
    window_labels,
)

FULL_ONLY = Variant(name="full_only", sparse_weight=0)


def train(windows: int, window_tokens: int, min_prefix_tokens: int = 16) -> Train:
    return Train(
        variants=(FULL_ONLY,),
        steps=1,
        windows=windows,
        window_tokens=window_tokens,
        min_prefix_tokens=min_prefix_tokens,
    )


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Shards, np.ndarray]:
    """Three files of 3, 1 and 5 rows, and all of them in one array."""
    whole = np.arange(9 * 4, dtype=np.uint16).reshape(9, 4) + 60_000
    files = []
    for name, rows in (("a", whole[:3]), ("b", whole[3:4]), ("c", whole[4:])):
        np.save(tmp_path / f"{name}.npy", rows)
        files.append(tmp_path / f"{name}.npy")
    return Shards(files), whole


def test_shards_read_as_one_array(shards: tuple[Shards, np.ndarray]) -> None:
    joined, whole = shards
    assert len(joined) == 9
    for indices in ([0, 1, 2], [2, 3, 4], [8, 0, 3, 3], list(range(9))):
        rows = joined.rows(indices)
        assert rows.dtype == torch.int64 and np.array_equal(rows.numpy(), whole[indices])


def test_no_shards_is_bad_data() -> None:
    with pytest.raises(BadData, match="no training sequences"):
        Shards([])


def test_every_sequence_comes_once_an_epoch() -> None:
    """Batches of 4 run through 10 sequences without regard to where a pass ends."""
    taken = [index for step in range(15) for index in batch_indices(10, 4, seed=3, step=step)]
    passes = [taken[at : at + 10] for at in range(0, 60, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 6, "every pass has its own order"


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert Counter(batch_indices(3, 7, seed=0, step=0)).most_common()[-1][1] == 2
    assert sorted(batch_indices(3, 6, seed=0, step=5)) == [0, 0, 1, 1, 2, 2]


def test_the_same_seed_and_step_are_the_same_batch() -> None:
    variant = Variant(name="v", budgets={16: 1.0, 32: 1.0}, num_views=3)
    for step in (0, 7, 123):
        assert batch_indices(50, 8, 1, step) == batch_indices(50, 8, 1, step)
        same = [draw(variant, train(2, 16), 128, 1, step, 1) for _ in range(2)]
        assert same[0] == same[1]
    draws = {
        (drawn.starts, tuple(drawn.budgets.items()))
        for drawn in (
            draw(variant, train(2, 16), 128, seed, step, micro)
            for seed in range(3)
            for step in range(3)
            for micro in range(3)
        )
    }
    assert len(draws) > 15, "seed, step and micro-batch all matter"
    assert batch_indices(50, 8, 1, 0) != batch_indices(50, 8, 2, 0)


@pytest.mark.parametrize(
    ("length", "windows", "window_tokens", "min_prefix"),
    [(128, 1, 16, 16), (128, 3, 16, 16), (96, 5, 16, 16), (97, 5, 16, 16), (130, 2, 7, 40), (32, 1, 1, 1)],
)
def test_windows_lie_inside_and_do_not_overlap(
    length: int, windows: int, window_tokens: int, min_prefix: int
) -> None:
    settings = train(windows, window_tokens, min_prefix)
    covered: set[int] = set()
    lengths: set[int] = set()
    for step in range(400):
        starts = draw(FULL_ONLY, settings, length, 0, step, 0).starts
        assert len(starts) == windows
        tokens = [token for start in starts for token in range(start, start + window_tokens)]
        assert len(set(tokens)) == len(tokens)
        assert min(tokens) >= min_prefix and max(tokens) < length
        assert len({start % window_tokens for start in starts}) == 1
        covered |= set(tokens)
        lengths |= set(starts)
    assert len({start % window_tokens for start in lengths}) <= PHASES + 1, "few prefix lengths"
    assert covered == set(range(min_prefix, length)), "every position behind the shortest prefix is trained"


def test_budgets_are_drawn_by_weight() -> None:
    """Pearson's χ² of 6000 draws stays below the 99.9 % point of 3 degrees of freedom."""
    weights = {16: 4.0, 32: 3.0, 64: 2.0, 128: 1.0}
    variant = Variant(name="v", budgets=weights, num_views=2)
    counts: Counter[int] = Counter()
    for step in range(1500):
        for micro in range(2):
            drawn = draw(variant, train(1, 16), 256, 42, step, micro)
            assert sum(drawn.budgets.values()) == 2
            counts.update(drawn.budgets)
    expected = {budget: 6000 * weight / 10 for budget, weight in weights.items()}
    chi_square = sum((counts[budget] - mean) ** 2 / mean for budget, mean in expected.items())
    assert chi_square < 16.27


def test_offsets_reach_the_longest_text_and_change_nothing_else() -> None:
    near = Variant(name="v", budgets={16: 1.0, 32: 1.0})
    far = near.model_copy(update={"positions": "anchor_offset", "served_tokens": 100})
    drawn = [draw(far, train(1, 16), 96, 0, step, 0) for step in range(300)]
    assert {one.offset for one in drawn} == set(range(5)), "up to 96 + 4 tokens"
    for step, one in enumerate(drawn):
        same = draw(near, train(1, 16), 96, 0, step, 0)
        assert (one.starts, one.budgets) == (same.starts, same.budgets) and same.offset == 0


def test_no_budgets_are_drawn_without_a_sparse_branch() -> None:
    assert draw(FULL_ONLY, train(1, 16), 96, 0, 0, 0).budgets == {}


def test_labels_are_those_of_the_windows_positions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    argmax = rng.integers(0, 90, (5, 40)).astype(np.uint16)
    ids = rng.integers(0, 90, (5, 40, 3)).astype(np.uint16)
    log_probs = -rng.random((5, 40, 3)).astype(np.float16)
    for name, array in (("tokens", argmax), ("argmax", argmax), ("ids", ids), ("log_probs", log_probs)):
        np.save(tmp_path / f"shard-00000.{name}.npy", array[:2])
        np.save(tmp_path / f"shard-00001.{name}.npy", array[2:])
    data = LabelledSequences(tmp_path, temperature=0.7)
    labels = window_labels(data, Windows([4, 0, 2], (30, 10)), 6, torch.device("cpu"))
    rows = [(sequence, start) for start in (30, 10) for sequence in (4, 0, 2)]
    for ours, theirs in ((labels.argmax, argmax), (labels.ids, ids), (labels.log_probs, log_probs)):
        expected = np.concatenate([theirs[row, start : start + 6] for row, start in rows])
        np.testing.assert_array_equal(ours.numpy(), expected)  # type: ignore[union-attr]
    assert labels.temperature == 0.7 and len(data) == 5
