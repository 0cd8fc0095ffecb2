"""`kernels.chunk_attention` against its oracle and plain loops, and what its head promises."""

import math

import pytest
import torch

from kernels import chunk_attention as kernel
from kernels import reference
from kernels.chunk_attention import chunk_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def made(B, H, G, W, S, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(B, H, G, W, D, generator=generator)
    return queries.to(DEVICE, dtype), torch.randn(B, H, S, D, generator=generator).to(DEVICE, dtype)


def assert_as_the_oracle(queries, keys, scaling):
    expected = reference.chunk_attention(queries.float(), keys.float(), scaling)
    shares = chunk_attention(queries, keys, scaling)
    assert shares.dtype == torch.float32 and shares.shape == expected.shape
    tolerance = 1e-5 if queries.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(shares, expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "G", "W", "S", "D"),
    [
        (1, 1, 1, 1, 40, 16),
        (2, 3, 2, 16, 77, 20),
        (1, 2, 5, 16, 203, 64),  # several tiles of queries
        (1, 1, 3, 7, 129, 128),
        (2, 2, 1, 16, 16, 8),  # nothing before the queries
        (1, 2, 2, 9, 9, 4),
    ],
)
def test_equals_the_oracle(B, H, G, W, S, D, dtype):
    assert_as_the_oracle(*made(B, H, G, W, S, D, dtype), D**-0.5)


def test_the_oracle_is_attention_written_out():
    """Query by query and key by key; with the tail's, the shares make 1."""
    queries, keys = made(1, 2, 2, 3, 21, 4)
    mass = [0.0] * 21
    for head in range(2):
        for group in range(2):
            for i in range(3):
                scores = [float(queries[0, head, group, i] @ keys[0, head, j]) * 0.7 for j in range(19 + i)]
                total = sum(map(math.exp, scores))
                for j, score in enumerate(scores):
                    mass[j] += math.exp(score) / total / 12
    shares = reference.chunk_attention(queries, keys, 0.7)[0]
    assert shares.tolist() == pytest.approx([sum(mass[:8]), sum(mass[8:16])], rel=1e-5)
    assert float(shares.sum()) + sum(mass[16:]) == pytest.approx(1, rel=1e-5)


def test_keys_in_several_shares(monkeypatch):
    """The last share holds keys that only some of the queries see, or none but the last one."""
    monkeypatch.setattr(kernel, "KEYS_PER_SHARE", 64)
    for S in (128, 129, 140, 200):
        assert_as_the_oracle(*made(1, 2, 2, 16, S, 16, seed=S), 0.25)


def test_large_scores_do_not_overflow():
    queries, keys = made(1, 1, 2, 16, 90, 16)
    assert_as_the_oracle(40 * queries, 40 * keys, 1.0)


def test_less_than_a_chunk_has_no_shares():
    assert chunk_attention(*made(2, 1, 1, 5, 7, 8), 1.0).shape == (2, 0)
    assert reference.chunk_attention(*made(2, 1, 1, 5, 7, 8), 1.0).shape == (2, 0)


def test_strided_views_give_the_same():
    queries, keys = made(2, 3, 2, 16, 77, 16)
    stored = keys.transpose(1, 2).contiguous().transpose(1, 2)
    buffer = torch.full((2, 3, 120, 16), torch.nan, device=DEVICE)
    buffer[:, :, :77] = keys
    turned = queries.transpose(2, 3).contiguous().transpose(2, 3)
    expected = chunk_attention(queries, keys, 0.25)
    for some_queries, some_keys in ((turned, stored), (queries, buffer[:, :, :77])):
        assert torch.equal(chunk_attention(some_queries, some_keys, 0.25), expected)


def test_more_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="16 queries are of the last tokens, and there are keys of 9"):
        chunk_attention(*made(1, 1, 1, 16, 9, 8), 1.0)


def test_no_scores_of_all_keys(largest_allocation):
    queries, keys = made(1, 1, 4, 16, 1500, 32, torch.float16)
    with largest_allocation(queries, keys) as largest:
        chunk_attention(queries, keys, 0.125)
    assert largest.num_bytes <= 2 * 64 * 2 * 4  # maxima and sums of the queries, in two shares of the keys
    with largest_allocation(queries, keys) as largest:
        reference.chunk_attention(queries, keys, 0.125)
    assert largest.num_bytes >= 64 * 1500 * 4  # the check sees what it should
