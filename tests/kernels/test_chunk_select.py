"""`kernels.chunk_select` against its oracle, and what its head promises."""

import pytest
import torch

from kernels import reference
from kernels.chunk_select import chunk_indices, chunk_select, gather_kept

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_kv(B: int, H: int, S: int, D: int, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, B, H, S, D, generator=generator).to(DEVICE, dtype)
    return keys, values


def assert_selects_as_oracle(keys, values, budget, keep_tail=True):
    kept_keys, kept_values, indices = chunk_select(keys, values, budget, keep_tail)
    oracle_keys, oracle_values, oracle_indices = reference.chunk_select(keys, values, budget, keep_tail)
    assert torch.equal(indices, oracle_indices)
    torch.testing.assert_close(kept_keys, oracle_keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(kept_values, oracle_values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "H", "S", "D", "budget"),
    [
        (1, 1, 129, 64, 16),
        (2, 3, 203, 16, 64),
        (1, 2, 1000, 128, 256),
        (2, 1, 96, 12, 48),
        (1, 2, 64, 8, 64),  # everything
        (1, 1, 45, 4, 512),  # more than everything
        (3, 1, 23, 4, 16),  # chunk 0 and the tail only
    ],
)
def test_selects_and_copies_as_the_oracle(B, H, S, D, budget, dtype):
    assert_selects_as_oracle(*random_kv(B, H, S, D, dtype), budget)


def test_the_tail_can_be_dropped_as_in_the_paper():
    assert_selects_as_oracle(*random_kv(2, 2, 101, 16), 32, keep_tail=False)


def test_a_prefix_shorter_than_a_chunk_is_kept_whole():
    keys, values = random_kv(2, 2, 5, 8)
    kept_keys, kept_values, indices = chunk_select(keys, values, 16)
    assert indices.tolist() == torch.arange(5).expand(2, 2, 5).tolist()
    assert torch.equal(kept_keys, keys) and torch.equal(kept_values, values)


def test_ties_go_to_the_lower_index_as_in_the_oracle():
    generator = torch.Generator().manual_seed(3)
    # Small integers: every product and sum is exact, in any order, and many chunks tie.
    for budget in (16, 56, 120):
        keys = torch.randint(-1, 2, (2, 2, 333, 4), generator=generator).float().to(DEVICE)
        assert_selects_as_oracle(keys, -keys, budget)


def test_equal_chunks_score_equally_wherever_they_lie():
    keys, values = random_kv(1, 1, 8 * 60 + 1, 64, seed=4)
    query = keys[0, 0, -1]
    best = random_kv(1, 1, 8, 64, seed=5)[0][0, 0] + query  # scores above all random chunks
    for chunk in (9, 23, 37, 58):
        keys[0, 0, 8 * chunk : 8 * chunk + 8] = best
    kept = chunk_select(keys, values, 8 * 3 + 1)[2][0, 0]
    assert (kept[:-1:8] // 8).tolist() == [0, 9, 23] and kept[-1] == 480


def test_negative_zero_ties_with_zero():
    keys, values = random_kv(1, 1, 41, 4)
    keys[:, :, :40], keys[:, :, 40] = 0.0, torch.tensor([1.0, 0.0, 0.0, 0.0], device=DEVICE)
    keys[:, :, 8:16] = -0.0  # scores -0 and loses to nobody
    assert_selects_as_oracle(keys, values, 24)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_sorts_as_in_torch(broken):
    keys, values = random_kv(1, 2, 165, 16)
    keys[0, 0, 50, 3] = broken
    keys[0, 0, 90, 3] = -broken
    values[0, 0, :60] = broken
    assert_selects_as_oracle(keys, values, 40)
    keys[0, 1, -1, 0] = torch.nan  # the query: all chunks score NaN, but chunk 0 is +inf
    assert_selects_as_oracle(keys, values, 40)


def test_near_ties_differ_from_the_oracle_within_the_rounding_of_a_sum():
    keys, values = random_kv(1, 1, 8 * 200, 32, seed=6)
    keys[:, :, 8:1590] = keys[:, :, 8:16].repeat(1, 1, 198, 1)[:, :, :1582]
    keys[:, :, 8:1590] += 1e-7 * random_kv(1, 1, 1582, 32, seed=7)[0]
    kept = chunk_select(keys, values, 400)[2][0, 0]
    assert kept.shape == (400,) and (kept.diff() > 0).all()
    chunks = keys[0, 0].double().view(200, 8, 32).mean(1)
    query = keys[0, 0, -1].double()
    scores = chunks @ query
    bound = 32 * 2**-24 * (chunks.abs() @ query.abs()).max()
    ours = scores[kept[::8] // 8][1:].min()
    others = torch.ones(200, dtype=torch.bool, device=DEVICE).index_fill_(0, kept // 8, False)
    assert ours >= scores[others].max() - 2 * bound


def test_strided_views_select_the_same():
    B, H, S, D = 2, 3, 203, 16
    keys, values = random_kv(B, H, S, D)
    stored_BSHD = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (keys, values)]
    buffers = torch.full((2, B, H, S + 50, D), torch.nan, device=DEVICE)
    buffers[:, :, :, :S] = torch.stack([keys, values])
    every_other = torch.full((2, B, H, S, 2 * D), torch.nan, device=DEVICE)
    every_other[..., ::2] = torch.stack([keys, values])
    for strided_keys, strided_values in (stored_BSHD, buffers[..., :S, :], every_other[..., ::2]):
        assert not strided_keys.is_contiguous()
        assert_selects_as_oracle(strided_keys, strided_values, 64)
    shared = keys[:, :1].expand(B, H, S, D)  # stride 0
    assert_selects_as_oracle(shared, values, 64)


def test_gather_takes_the_indices_of_any_policy():
    keys, values = random_kv(2, 2, 77, 20)
    indices = torch.tensor([0, 1, 2, 3, 40, 75, 76], device=DEVICE).expand(2, 2, 7)  # strides 0
    kept_keys, kept_values = gather_kept(keys, values, indices)
    assert torch.equal(kept_keys, keys[:, :, indices[0, 0]])
    assert torch.equal(kept_values, values[:, :, indices[0, 0]])
    assert gather_kept(keys, values, indices[:, :, :0])[0].shape == (2, 2, 0, 20)


def test_wrong_arguments_are_named():
    keys, values = random_kv(1, 1, 45, 4)
    with pytest.raises(ValueError, match=r"budget 8 .* at least 13"):
        chunk_indices(keys, 8)
    with pytest.raises(ValueError, match="differ in shape"):
        gather_kept(keys, values[..., :2], torch.zeros(1, 1, 1, dtype=torch.long))


def test_no_temporary_of_the_size_of_k(largest_allocation):
    keys, _ = random_kv(1, 2, 2000, 64, torch.float16)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    with largest_allocation(strided) as largest:
        indices = chunk_indices(strided, 32)
    scores_bytes = 2 * 250 * 4
    assert largest.num_bytes == max(scores_bytes, indices.nbytes) < strided.nbytes / 100
    with largest_allocation(strided) as largest:
        reference.chunk_topk(strided, 32)
    assert largest.num_bytes > strided.nbytes  # the check sees what it should


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: compiled kernels on a long prefix")
def test_long_prefixes_on_the_device():
    keys, values = random_kv(1, 8, 131072 + 5, 128, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = chunk_select(keys, values, 2048)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < sum(output.nbytes for output in outputs) + keys.nbytes / 64
    kept, oracle = outputs[2].flatten(0, 1), reference.chunk_topk(keys, 2048).flatten(0, 1)
    same = [torch.isin(ours, theirs).float().mean().item() for ours, theirs in zip(kept, oracle, strict=True)]
    assert min(same) > 0.98  # near ties at the threshold only
    index = outputs[2].unsqueeze(-1).expand(-1, -1, -1, 128)
    assert torch.equal(outputs[0], keys.gather(2, index)) and torch.equal(outputs[1], values.gather(2, index))
