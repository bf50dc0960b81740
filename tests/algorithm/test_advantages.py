"""shape_rewards, generalized_advantage_estimation, explained_variance."""

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussians, masks, poison, seeds, unit_interval
from tolerances import EXACT, FP32, FP64, TABLE_3_DECIMALS, assert_close

from rlhf_recipes.algorithm.advantages import (
    explained_variance,
    generalized_advantage_estimation,
    leave_one_out_means,
    quarters,
    shape_rewards,
)

POISONS = [float("nan"), float("inf"), float("-inf")]

# Rows: plain, right-padded, with a hole (tool tokens), left-padded with two holes, empty.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]])


def test_shaped_rewards_by_hand():
    scores = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    kl = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).expand(5, 5)
    expected = [
        [-0.5, -1.0, -1.5, -2.0, 7.5],
        [-0.5, -1.0, 18.5, 0.0, 0.0],  # the score is on the last valid token, never on a pad
        [-0.5, -1.0, 0.0, 0.0, 27.5],  # holes stay 0
        [0.0, -1.0, 0.0, 38.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    rewards = shape_rewards(scores, kl, MASK, kl_coef=0.5)
    assert_close(rewards, expected, EXACT)
    assert rewards.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_shaped_rewards_accept_every_mask_dtype(dtype):
    scores, kl = torch.arange(5.0), torch.ones(5, 5)
    expected = shape_rewards(scores, kl, MASK, kl_coef=0.25)
    assert_close(shape_rewards(scores, kl, MASK.to(dtype), kl_coef=0.25), expected, EXACT)


@given(seed=seeds, mask=masks(), kl_coef=st.sampled_from([0.0, 0.05, 2.0]))
def test_shaped_rewards_match_the_definition(seed, mask, kl_coef):
    (kl,) = gaussians(seed, mask.shape, 1)
    (scores,) = gaussians(seed + 1, mask.shape[:1], 1)
    expected = oracles.shaped_rewards(scores.tolist(), kl.tolist(), mask.tolist(), kl_coef)
    assert_close(shape_rewards(scores, kl, mask, kl_coef=kl_coef), expected, FP64)


@given(seed=seeds, mask=masks(), kl_coef=st.sampled_from([0.0, 0.05, 2.0]))
def test_parts_of_a_score_are_on_their_tokens_and_sum_to_it(seed, mask, kl_coef):
    kl, parts = gaussians(seed, mask.shape, 2)
    (scores,) = gaussians(seed + 1, mask.shape[:1], 1)
    given = (x.tolist() for x in (scores, parts, kl, mask))
    shaped = shape_rewards(scores, kl, mask, kl_coef=kl_coef, parts=poison(parts, mask, float("nan")))
    assert_close(shaped, oracles.dense_rewards(*given, kl_coef), FP64)
    whole = shape_rewards(scores, kl, mask, kl_coef=kl_coef)
    assert_close(shaped.sum(dim=1), whole.sum(dim=1), FP64)
    last = torch.zeros_like(parts)
    assert_close(shape_rewards(scores, kl, mask, kl_coef=kl_coef, parts=last), whole, EXACT)


@pytest.mark.parametrize("value", POISONS)
def test_shaped_rewards_never_read_masked_cells(value):
    (kl,) = gaussians(0, MASK.shape, 1)
    scores = torch.arange(5.0, dtype=torch.float64)
    clean = shape_rewards(scores, kl, MASK, kl_coef=0.1)
    assert_close(shape_rewards(scores, poison(kl, MASK, value), MASK, kl_coef=0.1), clean, EXACT)


def test_the_score_of_an_empty_row_goes_nowhere():
    scores = torch.tensor([1.0, float("nan")])
    mask = torch.tensor([[1, 1], [0, 0]])
    assert_close(shape_rewards(scores, torch.ones(2, 2), mask, kl_coef=0.5), [[-0.5, 0.5], [0.0, 0.0]], EXACT)


def test_shaped_rewards_leave_their_inputs_alone():
    scores, kl, mask = torch.ones(5), torch.ones(5, 5), MASK.clone()
    shape_rewards(scores, kl, mask, kl_coef=0.5)
    assert_close(kl, torch.ones(5, 5), EXACT)
    assert_close(scores, torch.ones(5), EXACT)
    assert_close(mask, MASK, EXACT)


def test_the_notes_table():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.8]])
    values = torch.tensor([[0.6, 0.5, 0.4, 0.3, 0.1]])
    mask = torch.ones(1, 5, dtype=torch.int64)
    advantages, returns = generalized_advantage_estimation(rewards, values, mask, gamma=1.0, lam=0.95)
    # Unrounded, by hand: .7, .95 * .7 - .2, and so on backwards.
    assert_close(advantages, [[0.113429375, 0.2246625, 0.34175, 0.465, 0.7]], FP32)
    assert_close(returns, [[0.713429375, 0.7246625, 0.74175, 0.765, 0.8]], FP32)
    assert_close(advantages, [[0.114, 0.225, 0.342, 0.465, 0.7]], TABLE_3_DECIMALS)


@pytest.mark.parametrize(
    ("bootstrap", "advantages", "returns"),
    [
        # delta = (1.5, 2, 2); A_1 = 2 + 2/4, A_0 = 1.5 + 2.5/4.
        (None, [2.125, 2.5, 2.0], [2.125, 3.5, 4.0]),
        (0.0, [2.125, 2.5, 2.0], [2.125, 3.5, 4.0]),
        # V = 8 after the last token adds gamma * 8 = 4 to the last delta.
        (8.0, [2.375, 3.5, 6.0], [2.375, 4.5, 8.0]),
    ],
)
def test_gae_by_hand(bootstrap, advantages, returns):
    """All numbers are binary fractions, so that the comparison is exact."""
    after = None if bootstrap is None else torch.tensor([bootstrap])
    actual = generalized_advantage_estimation(
        torch.tensor([[1.0, 2.0, 4.0]]),
        torch.tensor([[0.0, 1.0, 2.0]]),
        torch.ones(1, 3, dtype=torch.int64),
        gamma=0.5,
        lam=0.5,
        bootstrap_values=after,
    )
    assert_close(actual[0], [advantages], EXACT)
    assert_close(actual[1], [returns], EXACT)


@given(seed=seeds, mask=masks(), gamma=unit_interval, lam=unit_interval, bootstrap=st.booleans())
def test_gae_matches_the_quadratic_sum(seed, mask, gamma, lam, bootstrap):
    rewards, values = gaussians(seed, mask.shape, 2)
    after = gaussians(seed + 1, mask.shape[:1], 1)[0] if bootstrap else None
    advantages, returns = generalized_advantage_estimation(
        rewards, values, mask, gamma=gamma, lam=lam, bootstrap_values=after
    )
    arguments = (rewards.tolist(), values.tolist(), mask.tolist())
    options = {"gamma": gamma, "lam": lam, "bootstrap_values": after.tolist() if bootstrap else None}
    assert_close(advantages, oracles.gae(*arguments, **options), FP64)
    assert_close(returns, oracles.lambda_returns(*arguments, **options), FP64)


def gae_inputs(seed=0):
    rewards, values = gaussians(seed, MASK.shape, 2)
    (after,) = gaussians(seed + 1, MASK.shape[:1], 1)
    return rewards, values, after


def test_lam_zero_is_the_one_step_residual():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 5.0, 7.0]])
    advantages, _ = generalized_advantage_estimation(
        rewards, values, torch.tensor([[1, 1, 1]]), gamma=0.5, lam=0.0, bootstrap_values=torch.tensor([16.0])
    )
    assert_close(advantages, [[1 + 2.5 - 3, 2 + 3.5 - 5, 4 + 8.0 - 7]], EXACT)


def test_lam_one_is_the_discounted_return_whatever_the_values():
    rewards, after = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([16.0])
    mask = torch.tensor([[1, 1, 1]])
    monte_carlo = [[1 + 1 + 1 + 2.0, 2 + 2 + 4.0, 4 + 8.0]]
    for values in (torch.zeros(1, 3), torch.tensor([[3.0, -5.0, 7.0]])):
        advantages, returns = generalized_advantage_estimation(
            rewards, values, mask, gamma=0.5, lam=1.0, bootstrap_values=after
        )
        assert_close(returns, monte_carlo, EXACT)
        assert_close(advantages, torch.tensor(monte_carlo) - values, EXACT)


@given(seed=seeds, gamma=unit_interval, lam=unit_interval)
def test_the_true_value_function_leaves_no_advantage(seed, gamma, lam):
    (rewards,) = gaussians(seed, (2, 6), 1)
    (after,) = gaussians(seed + 1, (2,), 1)
    true = torch.stack([sum(gamma**k * rewards[:, t + k] for k in range(6 - t)) for t in range(6)], dim=1)
    true += torch.stack([gamma ** (6 - t) * after for t in range(6)], dim=1)
    advantages, returns = generalized_advantage_estimation(
        rewards, true, torch.ones(2, 6, dtype=torch.int64), gamma=gamma, lam=lam, bootstrap_values=after
    )
    assert_close(advantages, torch.zeros(2, 6), FP64)
    assert_close(returns, true, FP64)


def test_masked_cells_and_empty_rows_come_out_zero():
    rewards, values, after = gae_inputs()
    after[4] = float("nan")  # an empty completion has no value after it
    for output in generalized_advantage_estimation(rewards, values, MASK, gamma=0.9, lam=0.8, bootstrap_values=after):
        assert_close(output[MASK == 0], torch.zeros(int((MASK == 0).sum())), EXACT)
        assert output[MASK == 1].ne(0).all()


@pytest.mark.parametrize("value", POISONS)
def test_gae_never_reads_masked_cells(value):
    rewards, values, after = gae_inputs()
    options = {"gamma": 0.9, "lam": 0.8, "bootstrap_values": after}
    clean = generalized_advantage_estimation(rewards, values, MASK, **options)
    dirty = generalized_advantage_estimation(
        poison(rewards, MASK, value), poison(values, MASK, value), MASK, **options
    )
    assert_close(dirty[0], clean[0], EXACT)
    assert_close(dirty[1], clean[1], EXACT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_gae_accepts_every_mask_dtype(dtype):
    rewards, values, after = gae_inputs()
    options = {"gamma": 0.9, "lam": 0.8, "bootstrap_values": after}
    expected = generalized_advantage_estimation(rewards, values, MASK, **options)
    actual = generalized_advantage_estimation(rewards, values, MASK.to(dtype), **options)
    assert_close(actual[0], expected[0], EXACT)
    assert_close(actual[1], expected[1], EXACT)


def test_gae_leaves_its_inputs_alone_and_keeps_the_dtype():
    rewards, values, after = (x.float() for x in gae_inputs())
    before = [x.clone() for x in (rewards, values, after)]
    outputs = generalized_advantage_estimation(rewards, values, MASK, gamma=0.9, lam=0.8, bootstrap_values=after)
    for now, then in zip((rewards, values, after), before, strict=True):
        assert_close(now, then, EXACT)
    assert [x.dtype for x in outputs] == [torch.float32, torch.float32]
    assert outputs[0].data_ptr() != outputs[1].data_ptr()


@pytest.mark.parametrize(
    ("rewards", "values", "mask", "after"),
    [
        ((2, 3), (2, 4), (2, 3), None),
        ((2, 3), (2, 3), (2, 4), None),
        ((2, 3), (1, 3), (2, 3), None),  # would broadcast
        ((2, 3), (2, 3), (1, 3), None),
        ((2, 1), (2, 3), (2, 3), None),
        ((2, 3), (2, 3), (2, 3), (3,)),
        ((2, 3), (2, 3), (2, 3), (1,)),
        ((2, 3), (2, 3), (2, 3), (2, 1)),
        ((2, 3), (2, 3), (2, 3), (2, 3)),
    ],
)
def test_gae_refuses_shapes_that_do_not_agree(rewards, values, mask, after):
    with pytest.raises(ValueError, match="shape"):
        generalized_advantage_estimation(
            torch.zeros(rewards),
            torch.zeros(values),
            torch.ones(mask),
            gamma=1.0,
            lam=1.0,
            bootstrap_values=None if after is None else torch.zeros(after),
        )


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_gae_refuses_discounts_outside_the_unit_interval(name, value):
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=name):
        generalized_advantage_estimation(zeros, zeros, zeros + 1, **{"gamma": 1.0, "lam": 1.0, name: value})


RETURNS = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 7.0]])
VALID = torch.tensor([[1, 1, 0], [1, 0, 1]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RETURNS, 1.0),
        (RETURNS + 3, 1.0),  # a variance, not a mean square: a constant offset explains everything
        (torch.full((2, 3), 4.0), 0.0),
        (-RETURNS, -3.0),  # 1 - Var(2R)/Var(R)
        (torch.tensor([[1.0, 3.0, 0.0], [3.0, 0.0, 5.0]]), 0.8),  # residuals 0 0 2 2: 1 - 1/5
    ],
)
def test_explained_variance_by_hand(values, expected):
    assert_close(float(explained_variance(values, RETURNS, VALID)), expected, FP32)


@given(seed=seeds, mask=masks())
def test_explained_variance_matches_the_definition(seed, mask):
    values, returns = gaussians(seed, mask.shape, 2)
    expected = oracles.explained_variance(values.tolist(), returns.tolist(), mask.tolist())
    assert_close(float(explained_variance(values, returns, mask)), expected, FP64)


def test_explained_variance_never_reads_masked_cells():
    values = torch.tensor([[1.0, 3.0, float("nan")], [3.0, float("inf"), 5.0]])
    returns = poison(RETURNS, VALID)
    assert_close(float(explained_variance(values, returns, VALID)), 0.8, FP32)


@pytest.mark.parametrize("mask", [torch.zeros(2, 3), torch.tensor([[0, 1, 0], [0, 0, 0]]), torch.ones(2, 3)])
def test_explained_variance_of_constant_returns_is_zero(mask):
    (values,) = gaussians(0, (2, 3), 1)
    assert float(explained_variance(values, torch.full((2, 3), 2.0, dtype=torch.float64), mask)) == 0.0


@pytest.mark.parametrize("length", [3, 7, 31])
def test_explained_variance_of_constant_returns_survives_rounding(length):
    """In float32 the mean of seven 0.1 is not 0.1: their variance must not become 1e-17 and the ratio -1e15."""
    values = torch.arange(float(length))[None]
    fraction = explained_variance(values, torch.full((1, length), 0.1), torch.ones(1, length))
    assert_close(float(fraction), 0.0, EXACT)


@given(
    scores=st.lists(st.one_of(st.none(), st.integers(-8, 8)), min_size=6, max_size=6),
    group_size=st.sampled_from([2, 3]),
)
def test_leave_one_out_means_are_the_definition(scores, group_size):
    groups = [scores[i : i + group_size] for i in range(0, 6, group_size)]
    expected = sum(oracles.leave_one_out_means(groups), [])
    given_scores = torch.tensor([math.nan if x is None else x for x in scores], dtype=torch.float64)
    assert_close(leave_one_out_means(given_scores, group_size), expected, FP64)


def test_the_group_baseline_keeps_the_expected_gradient():
    """By enumeration: two answers to a prompt, each of two actions, for the gradient of the expected score."""
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([3.0, 1.0], dtype=torch.float64)
    logps = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)])
    expected = torch.autograd.grad((logps.exp() * scores).sum(), logit, retain_graph=True)[0]
    total, squares = {"loo": 0.0, "mean": 0.0, "none": 0.0}, {"loo": 0.0, "mean": 0.0, "none": 0.0}
    for pair in ((0, 0), (0, 1), (1, 0), (1, 1)):
        chosen = torch.tensor(pair)
        probability = logps[chosen].sum().exp().item()
        own = scores[chosen]
        baselines = {"loo": leave_one_out_means(own, 2), "mean": own.mean().expand(2), "none": torch.zeros(2)}
        for name, baseline in baselines.items():
            weights = (own - baseline) / 2
            gradient = torch.autograd.grad((logps[chosen] * weights).sum(), logit, retain_graph=True)[0].item()
            total[name] += probability * gradient
            squares[name] += probability * gradient**2
    assert total["loo"] == pytest.approx(expected.item())
    assert total["none"] == pytest.approx(expected.item())
    assert total["mean"] == pytest.approx(expected.item() / 2)
    assert squares["loo"] < squares["none"]


def test_quarters_by_hand():
    """The tokens of the mask count, not the columns; a completion of three tokens has no fourth quarter."""
    expected = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, -1, -1], [0, 1, -1, -1, 2], [-1, 0, -1, 2, -1], [-1] * 5])
    assert torch.equal(torch.stack(quarters(MASK)), torch.stack([expected == quarter for quarter in range(4)]))
