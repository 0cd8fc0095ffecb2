"""`kernels.verify_attention` against its oracle, torch's attention and the cache's own."""

import pytest
import torch
import torch.nn.functional as F

from kernels import reference
from kernels.verify_attention import MAX_SPLITS, Tiles, choose_splits, choose_tiles, verify_attention
from pipeline.kv.attention import suffix_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(block_m=16, block_n=16, splits=3, num_warps=4, num_stages=2)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def made(B, H, G, Q, length, capacity, D, dtype=torch.float32, seed=0):
    """Query, and buffers that hold NaN beyond `length`."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H * G, Q, D, generator=generator)
    stored = torch.randn(2, B, H, capacity, D, generator=generator)
    stored[:, :, :, length:] = torch.nan
    query, key, value = query.to(DEVICE, dtype), *stored.to(DEVICE, dtype)
    return query, key, value


def assert_close(actual, query, key, value, scaling, length):
    expected = reference.verify_attention(query.float(), key.float(), value.float(), scaling, length)
    tolerance = TOLERANCE[query.dtype]
    assert actual.dtype == query.dtype and actual.shape == query.shape
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "G", "Q", "length", "D"),
    [
        (1, 2, 1, 1, 37, 16),
        (2, 1, 4, 1, 64, 64),
        (1, 2, 4, 5, 77, 20),
        (2, 1, 1, 17, 50, 32),
        (1, 1, 4, 17, 17, 8),  # nothing stored before the queries
        (1, 1, 3, 7, 129, 128),
    ],
)
def test_equals_the_oracle(B, H, G, Q, length, D, dtype):
    query, key, value = made(B, H, G, Q, length, length + 23, D, dtype)
    out = verify_attention(query, key, value, D**-0.5, length, SMALL)
    assert_close(out, query, key, value, D**-0.5, length)


@pytest.mark.parametrize("window", [(0, 1), (0, 20), (4, 12), (5, 70), (80, 3)])
@pytest.mark.parametrize("lengths", [(77, 77), (77, 9)])
def test_a_window_is_a_mask(window, lengths):
    """Of rows of different lengths too; the last window has all that is stored as sinks."""
    query, key, value = made(2, 2, 2, 5, 77, 90, 16)
    length_B = torch.tensor(lengths, device=DEVICE)
    out = verify_attention(query, key, value, 0.25, length_B, SMALL, window)
    expected = reference.verify_attention(query, key, value, 0.25, length_B, window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    queries = torch.arange(77)[-5:].unsqueeze(1)
    keys = torch.arange(77)
    seen = (keys <= queries) & ((keys < window[0]) | (keys > queries - window[1]))
    masked = F.scaled_dot_product_attention(
        query[:1], key[:1, :, :77], value[:1, :, :77], attn_mask=seen.to(DEVICE), scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(out[:1], masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("G", "Q", "D"), [(1, 128, 16), (4, 33, 16), (4, 1, 128)])
def test_equals_the_oracle_with_the_default_tiles(G, Q, D):
    query, key, value = made(1, 1, G, Q, 301, 600, D)
    assert_close(verify_attention(query, key, value, 0.3, 301), query, key, value, 0.3, 301)


@pytest.mark.parametrize("splits", [1, 2, 5, 16])
def test_any_number_of_splits_gives_the_same(splits):
    query, key, value = made(1, 1, 2, 3, 90, 96, 16)
    tiles = Tiles(block_m=16, block_n=16, splits=splits, num_warps=4, num_stages=2)
    out = verify_attention(query, key, value, 0.25, 90, tiles)  # 16: more shares than blocks
    assert_close(out, query, key, value, 0.25, 90)


@pytest.mark.parametrize(("G", "Q"), [(1, 1), (4, 5)])
def test_equals_the_attention_of_the_cache(G, Q):
    query, key, value = made(2, 2, G, Q, 60, 64, 16)
    expected = suffix_attention(query, key[:, :, :60], value[:, :, :60], 0.25)
    out = verify_attention(query, key, value, 0.25, 60, SMALL)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_equals_causal_attention_over_a_whole_sequence():
    query, key, value = made(1, 1, 2, 40, 40, 40, 16)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    out = verify_attention(query, key, value, 16**-0.5, 40, SMALL)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_rows_may_have_lengths_of_their_own():
    B, H, G, Q, capacity, D = 4, 2, 2, 3, 80, 16
    lengths = [80, 3, 41, 0]  # full, queries only, some, idle
    query, key, value = made(B, H, G, Q, capacity, capacity, D)
    for row, length in enumerate(lengths):
        key[row, :, length:] = value[row, :, length:] = torch.nan
    length_B = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = verify_attention(query, key, value, 0.25, length_B, SMALL)
    assert_close(out, query, key, value, 0.25, length_B)
    assert (out[3] == 0).all()
    for row, length in enumerate(lengths[:3]):
        alone = verify_attention(*(part[row : row + 1] for part in (query, key, value)), 0.25, length, SMALL)
        assert torch.equal(out[row : row + 1], alone)


def test_a_query_before_the_first_token_gives_zeros():
    query, key, value = made(1, 1, 2, 5, 2, 32, 16)
    length = torch.tensor(2, device=DEVICE)
    out = verify_attention(query, key, value, 0.25, length, SMALL)
    assert (out[:, :, :3] == 0).all() and (out[:, :, 3:] != 0).all()
    assert_close(out, query, key, value, 0.25, length)


def test_a_length_on_the_device_gives_what_an_integer_gives():
    query, key, value = made(2, 1, 2, 4, 53, 64, 16)
    length = torch.tensor([9, 53, 11], device=DEVICE)[1]
    out = verify_attention(query, key, value, 0.25, length, SMALL)
    assert torch.equal(out, verify_attention(query, key, value, 0.25, 53, SMALL))


def test_strided_views_give_the_same():
    B, H, G, Q, length, D = 2, 2, 2, 5, 45, 16
    query, key, value = made(B, H, G, Q, length, length, D)
    expected = verify_attention(query, key, value, 0.25, length, SMALL)
    projected = query.transpose(1, 2).contiguous().transpose(1, 2)
    buffers = torch.full((2, 64, B, H, 2 * D), torch.nan, device=DEVICE)
    buffers[:, :length, ..., ::2] = torch.stack([key, value]).permute(0, 3, 1, 2, 4)
    strided_key, strided_value = buffers[..., ::2].permute(0, 2, 3, 1, 4)
    assert not projected.is_contiguous() and not strided_key.is_contiguous()
    out = verify_attention(projected, strided_key, strided_value, 0.25, length, SMALL)
    assert torch.equal(out, expected)


def test_the_output_is_laid_out_as_the_next_projection_reads_it():
    query, key, value = made(1, 2, 2, 3, 20, 20, 16)
    out = verify_attention(query, key, value, 0.25, 20, SMALL)
    assert out.transpose(1, 2).is_contiguous()


def test_memory_is_a_few_values_for_each_query_row_and_split(largest_allocation):
    query, key, value = made(1, 1, 4, 1, 4000, 4096, 64)
    with largest_allocation(query, key, value) as largest:
        verify_attention(query, key, value, 0.25, 4000, SMALL)
    assert largest.num_bytes == 4 * SMALL.splits * 64 * 4 < key.nbytes / 100
    with largest_allocation(query, key, value) as largest:
        reference.verify_attention(query, key, value, 0.25, 4000)
    assert largest.num_bytes >= key.nbytes  # the check sees what it should


def test_large_logits_do_not_overflow():
    query, key, value = made(1, 1, 1, 2, 70, 70, 16)
    key[:, :, 33] = query[:, :, 1] * 1e4
    out = verify_attention(query, key, value, 1.0, 70, SMALL)
    torch.testing.assert_close(out[0, 0, 1], value[0, 0, 33])


def test_splits_fill_the_device_and_never_outnumber_the_keys():
    assert choose_splits(200, 32, 264) == 1  # too few keys to share
    assert choose_splits(16384, 1024, 264) == 1  # full without splits
    for num_tiles in (1, 7, 12, 32, 100, 200):
        splits = choose_splits(16384, num_tiles, 264)
        waves = -(-num_tiles * splits // 264)
        assert 1 <= splits <= min(MAX_SPLITS, 16384 // 256)
        assert num_tiles * splits / (waves * 264) > (0.2 if num_tiles == 1 else 0.7)


def test_the_default_grid_depends_on_the_capacity_alone():
    query, key, value = made(1, 1, 1, 1, 600, 600, 16)
    tiles = choose_tiles(1, 600, 1, query)
    assert tiles.splits > 1
    for length in (1, 300, 600):
        out = verify_attention(query, key, value, 0.25, length)
        assert torch.equal(out, verify_attention(query, key, value, 0.25, length, tiles))
        assert_close(out, query, key, value, 0.25, length)


def test_wrong_arguments_are_named():
    query, key, value = made(2, 2, 2, 3, 20, 32, 16)
    with pytest.raises(ValueError, match="between the 3 queries and the capacity 32"):
        verify_attention(query, key, value, 0.25, 33)
    with pytest.raises(ValueError, match="between the 3 queries and the capacity 32"):
        verify_attention(query, key, value, 0.25, 2)
    with pytest.raises(ValueError, match=r"length has shape \(3,\)"):
        verify_attention(query, key, value, 0.25, torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match="are not"):
        verify_attention(query[:, :3], key, value, 0.25, 20)
    with pytest.raises(ValueError, match="different types"):
        verify_attention(query.half(), key, value, 0.25, 20)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: compiled kernels and CUDA graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "Q"), [(32, 1, 1), (8, 4, 17), (12, 1, 128)])
def test_a_graph_replays_while_the_cache_grows(H, G, Q, dtype):
    capacity, D = 16384, 128
    query, key, value = made(1, H, G, Q, capacity, capacity, D, dtype)
    length = torch.tensor(Q, device=DEVICE)
    verify_attention(query, key, value, D**-0.5, length)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = verify_attention(query, key, value, D**-0.5, length)
    for stored in (Q, 4097, capacity):
        length.fill_(stored)
        graph.replay()
        assert_close(out, query, key, value, D**-0.5, stored)
