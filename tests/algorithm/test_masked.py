"""masked_mean, masked_var, masked_whiten: statistics of the cells whose mask is 1, and of no others."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussians, masks, poison, seeds
from tolerances import EXACT, FP32, FP32_LARGE_MEAN, FP32_LARGE_VARIANCE, FP64, assert_close

from rlhf_recipes.algorithm.masked import masked_mean, masked_var, masked_whiten

VALUES = torch.tensor([[1.0, 2.0, 100.0], [6.0, -50.0, 7.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 1]])
POISONS = [float("nan"), float("inf"), float("-inf"), 1e30]


def test_hand_numbers():
    assert_close(masked_mean(VALUES, MASK), 4.0, EXACT)  # (1 + 2 + 6 + 7) / 4
    assert_close(masked_var(VALUES, MASK), 6.5, EXACT)  # (9 + 4 + 4 + 9) / 4: population, not 26 / 3
    assert_close(masked_mean(VALUES, MASK, dim=1), [1.5, 6.5], EXACT)
    assert_close(masked_mean(VALUES, MASK, dim=0), [3.5, 2.0, 7.0], EXACT)


def test_results_are_scalars_of_the_input_dtype():
    for statistic in (masked_mean(VALUES, MASK), masked_var(VALUES, MASK)):
        assert statistic.shape == ()
        assert statistic.dtype == torch.float32
    whitened = masked_whiten(VALUES, MASK)
    assert whitened.shape == VALUES.shape
    assert whitened.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_every_mask_dtype_means_the_same(dtype):
    mask = MASK.to(dtype)
    assert_close(masked_mean(VALUES, mask), 4.0, EXACT)
    assert_close(masked_var(VALUES, mask), 6.5, EXACT)
    assert_close(masked_whiten(VALUES, mask), masked_whiten(VALUES, MASK), EXACT)


@given(seed=seeds, mask=masks())
def test_moments_match_the_definition(seed, mask):
    (values,) = gaussians(seed, mask.shape, 1)
    _, mean, variance = oracles.masked_moments(values.tolist(), mask.tolist())
    assert_close(masked_mean(values, mask), mean, FP64)
    assert_close(masked_var(values, mask), variance, FP64)
    rows = [oracles.moments(row[keep.bool()].tolist())[1] for row, keep in zip(values, mask, strict=True)]
    assert_close(masked_mean(values, mask, dim=1), rows, FP64)


@pytest.mark.parametrize("value", POISONS)
def test_masked_cells_may_hold_anything(value):
    dirty = poison(VALUES, MASK, value)
    assert_close(masked_mean(dirty, MASK), masked_mean(VALUES, MASK), EXACT)
    assert_close(masked_mean(dirty, MASK, dim=1), masked_mean(VALUES, MASK, dim=1), EXACT)
    assert_close(masked_var(dirty, MASK), masked_var(VALUES, MASK), EXACT)
    for center in (True, False):
        assert_close(masked_whiten(dirty, MASK, center=center), masked_whiten(VALUES, MASK, center=center), EXACT)


@pytest.mark.parametrize("value", POISONS)
def test_masked_cells_send_no_gradient(value):
    dirty = poison(VALUES, MASK, value).requires_grad_()
    masked_mean(dirty, MASK).backward()
    assert_close(dirty.grad, MASK / 4, EXACT)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_empty_mask_gives_zero(value):
    values, mask = torch.full((2, 3), value), torch.zeros(2, 3, dtype=torch.int64)
    assert_close(masked_mean(values, mask), 0.0, EXACT)
    assert_close(masked_mean(values, mask, dim=1), [0.0, 0.0], EXACT)
    assert_close(masked_var(values, mask), 0.0, EXACT)
    assert_close(masked_whiten(values, mask), torch.zeros(2, 3), EXACT)


def test_one_cell():
    value, mask = torch.tensor([[3.0]]), torch.tensor([[1]])
    assert_close(masked_mean(value, mask), 3.0, EXACT)
    assert_close(masked_var(value, mask), 0.0, EXACT)
    assert_close(masked_whiten(value, mask), [[0.0]], EXACT)
    assert_close(masked_whiten(value, mask, center=False), [[3.0]], EXACT)


def test_inputs_are_left_alone():
    values, mask = VALUES.clone(), MASK.clone()
    masked_mean(values, mask)
    masked_var(values, mask)
    masked_whiten(values, mask)
    assert_close(values, VALUES, EXACT)
    assert_close(mask, MASK, EXACT)


@given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 30.0]), shift=st.sampled_from([-7.0, 0.0, 7.0]))
def test_whitened_cells_have_mean_zero_and_variance_one(seed, scale, shift):
    noise, coin = gaussians(seed, (4, 9), 2)
    values, mask = noise * scale + shift, (coin > -0.5).long()
    whitened = masked_whiten(values, mask, eps=0.0)
    _, mean, variance = oracles.masked_moments(whitened.tolist(), mask.tolist())
    assert_close(mean, 0.0, FP64)
    assert_close(variance, 1.0, FP64)
    assert_close(whitened[mask == 0], torch.zeros(int((mask == 0).sum())), EXACT)


@pytest.mark.parametrize("center", [True, False])
def test_whitening_matches_the_definition(center):
    (values,) = gaussians(1, (3, 8), 1)
    values, mask = values * 2 + 5, torch.ones(3, 8, dtype=torch.int64)
    mask[0, 3:5] = mask[2] = 0
    expected = oracles.whiten(values.tolist(), mask.tolist(), center=center)
    assert_close(masked_whiten(values, mask, center=center, eps=0.0), expected, FP64)
    # The default eps is a guard, not a change of scale.
    assert_close(masked_whiten(values.float(), mask, center=center), expected, FP32)


def test_uncentred_whitening_keeps_the_mean_and_rescales_about_it():
    values, mask = torch.tensor([[10.0, 14.0, 0.0]]), torch.tensor([[1, 1, 0]])
    # mean 12, sd 2: 12 -+ 1. Dividing without the subtraction would give 5 and 7.
    assert_close(masked_whiten(values, mask, center=False), [[11.0, 13.0, 0.0]], FP32)
    assert_close(masked_whiten(values, mask, center=True), [[-1.0, 1.0, 0.0]], FP32)


@pytest.mark.parametrize("wrap", [float, torch.tensor])
def test_given_statistics_replace_those_of_the_batch(wrap):
    mean, var = wrap(1.0), wrap(4.0)
    values = torch.tensor([[9.0, 1.0, 99.0]])  # their own statistics are 5 and 16
    mask = torch.tensor([[1, 1, 0]])
    assert_close(masked_whiten(values, mask, mean=mean, var=var), [[4.0, 0.0, 0.0]], FP32)
    # The mean that is added again is the given one.
    assert_close(masked_whiten(values, mask, center=False, mean=mean, var=var), [[5.0, 1.0, 0.0]], FP32)


def test_a_given_zero_is_a_statistic_too():
    values, mask = torch.tensor([[2.0, 4.0]]), torch.tensor([[1, 1]])
    assert_close(masked_whiten(values, mask, mean=0.0, var=4.0), [[1.0, 2.0]], FP32)


def test_constant_cells_whiten_to_zero_without_nan():
    values, mask = torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.int64)
    assert_close(masked_whiten(values, mask), torch.zeros(2, 3), EXACT)
    assert_close(masked_whiten(values, mask, center=False), values, EXACT)


def test_float32_with_a_mean_far_from_zero():
    (noise,) = gaussians(0, (8, 128), 1)
    values, mask = (1e4 + 0.05 * noise).float(), torch.ones(8, 128, dtype=torch.int64)
    mask[::2, 64:] = 0
    _, _, variance = oracles.masked_moments(values.tolist(), mask.tolist())
    assert_close(masked_var(values, mask), variance, FP32_LARGE_VARIANCE)
    whitened = masked_whiten(values, mask)
    _, mean, variance = oracles.masked_moments(whitened.tolist(), mask.tolist())
    assert_close(mean, 0.0, FP32_LARGE_MEAN)
    assert_close(variance, 1.0, FP32_LARGE_MEAN)
