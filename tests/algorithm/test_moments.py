"""Statistics over all ranks: two ranks give the same as one rank on the same global batch, however it is shared."""

import oracles
import pytest
import torch
from hypothesis import given
from processes import run_in_processes
from strategies import gaussians, masks, poison, seeds
from tolerances import EXACT, FP32, FP32_LARGE_MEAN, FP64, assert_close

from rlhf_recipes.algorithm.advantages import explained_variance
from rlhf_recipes.algorithm.distributed import global_means, global_moments, global_sum, global_var
from rlhf_recipes.algorithm.masked import masked_whiten

pytestmark = pytest.mark.distributed


def test_one_process_by_hand():
    values, mask = torch.tensor([[1.0, 2.0, 100.0], [6.0, -50.0, 7.0]]), torch.tensor([[1, 1, 0], [1, 0, 1]])
    moments = global_moments(values, mask)
    assert all(isinstance(x, torch.Tensor) and x.shape == () for x in moments)
    assert_close(torch.stack([x.double() for x in moments]), [4.0, 4.0, 6.5], EXACT)


@given(seed=seeds, mask=masks())
def test_one_process_matches_the_definition(seed, mask):
    (values,) = gaussians(seed, mask.shape, 1)
    expected = oracles.masked_moments(values.tolist(), mask.tolist())
    for cells in (values, poison(values, mask), poison(values, mask, float("inf"))):
        for actual, target in zip(global_moments(cells, mask.bool()), expected, strict=True):
            assert_close(actual, target, FP64)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0), (0,)])
def test_nothing_anywhere_gives_zeros(shape):
    moments = global_moments(torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.int64))
    assert_close(torch.stack([x.double() for x in moments]), [0.0, 0.0, 0.0], EXACT)


def test_means_by_hand():
    """The result is one count, and the mean of each tensor over the same mask."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    values, nan = torch.tensor([[1.0, 2.0, 100.0], [6.0, -50.0, 7.0]]), float("nan")
    flags = torch.tensor([[True, False, True], [False, True, True]])
    assert_close(global_means(mask, values, flags)[1], [3.0, 1 / 3], FP32)
    assert global_means(mask, values)[0] == 3
    assert_close(global_means(mask, poison(values, mask, nan))[1], [3.0], EXACT)
    assert global_means(torch.zeros(2, 3), values, values) == (0, [0.0, 0.0])


def _shards():
    """Return {name: (values, mask, first row of rank 1)}: one global batch and one way to share it per name."""
    noise, coin = gaussians(0, (6, 8), 2)
    mask = (coin > -0.5).long()
    left_empty, all_empty = mask.clone(), torch.zeros_like(mask)
    left_empty[:3] = 0
    return {
        "equal shards": (noise * 2 + 3, mask, 3),
        "unequal shards": (noise * 2 + 3, mask, 1),
        "ranks far apart": (noise + torch.arange(6.0)[:, None] * 1000, mask, 3),
        "rank 0 all masked": (poison(noise, left_empty), left_empty, 3),
        "rank 1 without rows": (noise, mask, 6),
        "nothing anywhere": (poison(noise, all_empty), all_empty, 3),
        "float32": ((noise * 2 + 3).float(), mask, 2),
        "float32, large mean": ((1e4 + 0.05 * noise).float(), mask, 2),
    }


def _rank(rank, world_size):
    """Return this rank's statistics of every case, and the advantages that are whitened with them."""
    results = {"sum": global_sum(torch.tensor([1.0, 10.0 * rank]))}
    for name, (values, mask, cut) in _shards().items():
        rows = slice(0, cut) if rank == 0 else slice(cut, None)
        count, mean, var = global_moments(values[rows], mask[rows])
        whitened = masked_whiten(values[rows], mask[rows], mean=mean, var=var)
        means = global_means(mask[rows], values[rows], values[rows] > 3)
        explained = explained_variance(values[rows] / 2, values[rows], mask[rows], variance=global_var)
        results[name] = (count, mean, var, whitened, means, explained)
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_in_processes(_rank, 2)


@pytest.mark.parametrize("name", _shards())
def test_two_ranks_equal_one(ranks, name):
    values, mask, _ = _shards()[name]
    tolerance = FP64 if values.dtype == torch.float64 else FP32
    expected = oracles.masked_moments(values.tolist(), mask.tolist())
    alone = global_moments(values, mask)
    for rank in ranks:
        for actual, single, target in zip(rank[name][:3], alone, expected, strict=True):
            assert_close(actual, target, tolerance)
            assert_close(actual, single, tolerance)


@pytest.mark.parametrize("name", _shards())
def test_both_ranks_hold_the_same_bits(ranks, name):
    for one, other in zip(ranks[0][name][:3], ranks[1][name][:3], strict=True):
        assert_close(one, other, EXACT)


@pytest.mark.parametrize("name", ["equal shards", "unequal shards", "rank 0 all masked", "rank 1 without rows"])
def test_advantages_are_whitened_by_the_global_statistics(ranks, name):
    values, mask, cut = _shards()[name]
    whitened = torch.cat([rank[name][3] for rank in ranks])
    assert_close(whitened, masked_whiten(values, mask), FP64)
    # Negative control: with statistics of its own, a rank computes something else.
    local = torch.cat([masked_whiten(values[rows], mask[rows]) for rows in (slice(0, cut), slice(cut, None))])
    if name.endswith("equal shards"):
        assert (local - whitened).abs().max() > FP32_LARGE_MEAN["atol"]


def test_sums_are_elementwise(ranks):
    for rank in ranks:
        assert_close(rank["sum"], [2.0, 10.0], EXACT)


@pytest.mark.parametrize("name", [name for name in _shards() if name != "float32, large mean"])
def test_metrics_of_two_ranks_equal_those_of_one(ranks, name):
    values, mask, _ = _shards()[name]
    count, mean, _ = oracles.masked_moments(values.tolist(), mask.tolist())
    _, share, _ = oracles.masked_moments((values > 3).double().tolist(), mask.tolist())
    explained = oracles.explained_variance((values / 2).tolist(), values.tolist(), mask.tolist())
    for rank in ranks:
        *_, (rank_count, rank_means), rank_explained = rank[name]
        assert rank_count == count
        assert_close(rank_means, [mean, share], FP32)
        assert_close(rank_explained, explained, FP32)


def _fail_on_rank_one(rank, world_size):
    if rank == 1:
        raise ArithmeticError("rank one says no")
    return rank


def test_a_failing_rank_fails_the_test():
    with pytest.raises(Exception, match="rank one says no"):
        run_in_processes(_fail_on_rank_one, 2)
