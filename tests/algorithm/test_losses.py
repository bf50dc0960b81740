"""The value loss, the average over tokens, the clip fraction, and the oracle of TRL's policy loss."""

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import gaussians, masks, poison, seeds
from tolerances import EXACT, FINITE_DIFFERENCE, FP32, FP64, assert_close

from rlhf_recipes.algorithm.losses import (
    aggregate_token_loss,
    clipped_value_loss,
    is_value_clipped,
    l2_penalty,
    per_token_value_loss,
    trust_region_mask,
)

POISONS = [float("nan"), float("inf"), float("-inf")]

# (V, R, loss, dloss/dV) for V_old = 0 and c = 1/2, both signs of the move and of the target.
HAND_CELLS = [
    (0.25, 1.0, 0.28125, -0.75),  # inside the clip: 0.5 * 0.75^2
    (-0.25, 1.0, 0.78125, -1.25),
    (1.0, 0.0, 0.5, 1.0),  # moved too far away from R: unclipped 1 > clipped .25, so it is pulled back
    (-1.0, 0.0, 0.5, -1.0),
    (1.0, 2.0, 1.125, 0.0),  # moved far towards R: clipped 1.5^2 > 1, so there is no gradient
    (-1.0, -2.0, 1.125, 0.0),
    (4.0, 2.0, 2.0, 2.0),  # overshot R: |V - R| = 2 > 1.5
    (-4.0, -2.0, 2.0, -2.0),
]


def cells():
    values, returns, losses, gradients = (torch.tensor([column]) for column in zip(*HAND_CELLS, strict=True))
    return values, torch.zeros_like(values), returns, losses, gradients


def test_per_token_value_loss_by_hand():
    values, old_values, returns, losses, _ = cells()
    loss = per_token_value_loss(values, old_values, returns, cliprange=0.5)
    assert_close(loss, losses, EXACT)
    assert loss.dtype == torch.float32


@given(seed=seeds, cliprange=st.sampled_from([0.1, 0.5, 2.0]))
def test_per_token_value_loss_matches_the_definition(seed, cliprange):
    values, old_values, returns = gaussians(seed, (3, 4), 3)
    expected = [
        [oracles.value_loss_cell(*cell, cliprange) for cell in zip(*rows, strict=True)]
        for rows in zip(values.tolist(), old_values.tolist(), returns.tolist(), strict=True)
    ]
    loss = per_token_value_loss(values, old_values, returns, cliprange=cliprange)
    assert_close(loss, expected, FP64)
    # The loss is pessimistic: never below the plain squared error, and equal to it without clipping.
    assert (loss >= 0.5 * (values - returns) ** 2).all()
    wide = per_token_value_loss(values, old_values, returns, cliprange=1e3)
    assert_close(wide, 0.5 * (values - returns) ** 2, FP64)


def test_value_loss_weighs_sequences_equally():
    # V - R = 2 on the three tokens of row 0, 4 on the single token of row 1: (2 + 8) / 2, not (3 * 2 + 8) / 4.
    values = torch.tensor([[2.0, 2.0, 2.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss = clipped_value_loss(values, values.clone(), torch.zeros(2, 3), mask, cliprange=0.5)
    assert_close(loss, 5.0, EXACT)
    assert loss.shape == ()


@given(seed=seeds, mask=masks(), cliprange=st.sampled_from([0.1, 0.5, 2.0]))
def test_value_loss_matches_the_definition(seed, mask, cliprange):
    values, old_values, returns = gaussians(seed, mask.shape, 3)
    loss = clipped_value_loss(values, old_values, returns, mask, cliprange=cliprange)
    arguments = (values.tolist(), old_values.tolist(), returns.tolist(), mask.tolist())
    assert_close(loss, oracles.clipped_value_loss(*arguments, cliprange), FP64)
    assert_close(clipped_value_loss(values, old_values, returns, mask.bool(), cliprange=cliprange), loss, EXACT)


def test_value_loss_gradient_is_the_slope_of_the_definition():
    values, old_values, returns = gaussians(5, (3, 4), 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    values.requires_grad_()
    clipped_value_loss(values, old_values, returns, mask, cliprange=0.5).backward()

    step = 1e-5
    slopes = torch.zeros(3, 4, dtype=torch.float64)
    for cell in mask.nonzero().tolist():
        sides = []
        for sign in (1, -1):
            moved = values.detach().clone()
            moved[tuple(cell)] += sign * step
            arguments = (moved.tolist(), old_values.tolist(), returns.tolist(), mask.tolist())
            sides.append(oracles.clipped_value_loss(*arguments, 0.5))
        slopes[tuple(cell)] = (sides[0] - sides[1]) / (2 * step)
    assert_close(values.grad, slopes, FINITE_DIFFERENCE)
    assert (slopes != 0).sum() >= 4


def test_the_gradient_goes_through_values_only():
    values, old_values, returns, _, gradients = cells()
    leaves = [x.requires_grad_() for x in (values, old_values, returns)]
    clipped_value_loss(*leaves, torch.ones_like(values), cliprange=0.5).backward()
    assert_close(values.grad, gradients / gradients.numel(), EXACT)
    assert old_values.grad is None or not old_values.grad.any()
    assert returns.grad is None or not returns.grad.any()


@pytest.mark.parametrize("value", POISONS)
def test_value_loss_never_reads_masked_cells(value):
    tensors = gaussians(2, (2, 3), 3)
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    clean, dirty = [x.clone() for x in tensors], [poison(x, mask, value) for x in tensors]
    losses = []
    for inputs in (clean, dirty):
        inputs[0].requires_grad_()
        losses.append(clipped_value_loss(*inputs, mask, cliprange=0.5))
        losses[-1].backward()
    assert_close(losses[1], losses[0], EXACT)
    assert_close(dirty[0].grad, clean[0].grad, EXACT)
    assert_close(dirty[0].grad[mask == 0], torch.zeros(3), EXACT)


def test_an_empty_batch_has_a_zero_loss_and_a_zero_gradient():
    values = torch.full((2, 3), float("nan"), requires_grad=True)
    nothing = torch.zeros(2, 3)
    loss = clipped_value_loss(values, nothing, nothing, nothing, cliprange=0.5)
    assert_close(loss, 0.0, EXACT)
    loss.backward()
    assert_close(values.grad, nothing, EXACT)


TOKENS = torch.tensor([[1.0, 2.0, 3.0], [8.0, 5.0, 7.0], [4.0, 4.0, 4.0]])
TOKEN_MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10 / 3),  # the default is the notes' formula: (2 + 8 + 0) / 3
        ({"loss_type": "grpo"}, 10 / 3),
        ({"loss_type": "dapo", "num_items": 4}, 14 / 4),
        ({"loss_type": "dapo", "num_items": torch.tensor(28)}, 14 / 28),  # the step's number, not this piece's
        ({"loss_type": "dr_grpo", "max_completion_length": 10}, 14 / 30),
    ],
)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_aggregation_by_hand(options, expected, mask_dtype):
    loss = aggregate_token_loss(TOKENS, TOKEN_MASK.to(mask_dtype), **options)
    assert_close(loss, expected, FP32)
    assert loss.shape == ()


@given(seed=seeds, mask=masks())
def test_grpo_aggregation_matches_the_definition(seed, mask):
    (tokens,) = gaussians(seed, mask.shape, 1)
    expected = oracles.mean_of_sequence_means(tokens.tolist(), mask.tolist())
    assert_close(aggregate_token_loss(tokens, mask), expected, FP64)


ALL_TYPES = [
    {"loss_type": "grpo"},
    {"loss_type": "dapo", "num_items": 4},
    {"loss_type": "dr_grpo", "max_completion_length": 10},
]


@pytest.mark.parametrize("options", ALL_TYPES)
@pytest.mark.parametrize("value", POISONS)
def test_aggregation_never_reads_masked_cells(options, value):
    dirty = poison(TOKENS, TOKEN_MASK, value).requires_grad_()
    loss = aggregate_token_loss(dirty, TOKEN_MASK, **options)
    assert_close(loss, aggregate_token_loss(TOKENS, TOKEN_MASK, **options), EXACT)
    loss.backward()
    assert_close(dirty.grad[TOKEN_MASK == 0], torch.zeros(5), EXACT)
    assert dirty.grad[TOKEN_MASK == 1].gt(0).all()


@pytest.mark.parametrize("options", ALL_TYPES)
def test_aggregation_of_nothing_is_zero(options):
    assert_close(aggregate_token_loss(TOKENS, torch.zeros(3, 3), **options), 0.0, EXACT)


def test_token_sums_do_not_depend_on_the_cut():
    """The pieces of dapo add up. Pieces of grpo and dr_grpo of equal size have the loss of the whole as their mean."""
    (tokens,) = gaussians(0, (4, 3), 1)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    pieces = [(tokens[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    for options, scale in [(ALL_TYPES[0], 2), (ALL_TYPES[1], 1), (ALL_TYPES[2], 2)]:
        total = sum(aggregate_token_loss(*piece, **options) for piece in pieces) / scale
        assert_close(total, aggregate_token_loss(tokens, mask, **options), FP64)


@pytest.mark.parametrize("loss_type", ["bnpo", "GRPO", "", None])
def test_an_unknown_loss_type_is_refused(loss_type):
    with pytest.raises(ValueError, match=r"grpo"):
        aggregate_token_loss(TOKENS, TOKEN_MASK, loss_type=loss_type, num_items=4, max_completion_length=10)


def test_clipped_values_by_hand():
    # |V - V_old| = 0.25, 2, 0.5 (on the edge: not clipped), measured from the old value and not from 0.
    clipped = is_value_clipped(torch.tensor([[8.0, 8.0, 0.5]]), torch.tensor([[8.25, 6.0, 0.0]]), cliprange=0.5)
    assert_close(clipped, [[0.0, 1.0, 0.0]], EXACT)


def test_l2_penalty_by_hand():
    assert_close(l2_penalty(torch.tensor([3.0, -4.0, 0.0, 1.0])), 6.5, EXACT)


def surrogates(ratios, advantages):
    logps = torch.tensor([ratios], dtype=torch.float64).log().tolist()
    arguments = (logps, [[0.0] * len(ratios)], [advantages], [[1] * len(ratios)])
    clip = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    return oracles.clipped_surrogate(*arguments, **clip), oracles.surrogate_with_min_over_ratios(*arguments, **clip)


@pytest.mark.parametrize(
    ("ratio", "advantage", "products", "ratios"),
    [
        (1.5, 1.0, -1.2, -1.2),
        (0.5, 1.0, -0.5, -0.5),
        (1.1, -1.0, 1.1, 1.1),
        (1.5, -1.0, 1.5, 1.2),  # over the ratios, a bad token that became more likely avoids its full penalty ...
        (0.5, -1.0, 0.8, 0.5),  # ... and a bad token that is rare enough is still pushed down
    ],
)
def test_the_min_is_over_products_not_over_ratios(ratio, advantage, products, ratios):
    assert_close(surrogates([ratio], [advantage]), (products, ratios), FP64)


def test_the_surrogate_clips_each_side_with_its_own_epsilon():
    def loss(ratio, advantage):
        logps = [[float(torch.tensor(ratio, dtype=torch.float64).log())]]
        return oracles.clipped_surrogate(logps, [[0.0]], [[advantage]], [[1]], epsilon_low=0.1, epsilon_high=0.3)

    assert_close([loss(2.0, 1.0), loss(0.5, -1.0)], [-1.3, 0.9], FP64)


def test_the_surrogate_at_ratio_one_is_the_mean_of_sequence_means():
    advantages, mask = [[1.0, 2.0, 3.0], [10.0, 99.0, 99.0]], [[1, 1, 1], [1, 0, 0]]
    logps = [[-1.0, -2.0, -3.0]] * 2
    loss = oracles.clipped_surrogate(logps, logps, advantages, mask, epsilon_low=0.2, epsilon_high=0.2)
    assert_close(loss, -6.0, FP64)


EPSILONS = {"epsilon_low": 0.2, "epsilon_high": 0.3}


@given(mask=masks(), seed=seeds, level=st.sampled_from(["token", "prefix", "sequence"]))
def test_trust_region_is_the_definition(mask, seed, level):
    log_ratio, advantages = gaussians(seed, mask.shape, 2)
    log_ratio *= 0.2
    expected = oracles.trust_region(log_ratio.tolist(), advantages.tolist(), mask.tolist(), level=level, **EPSILONS)
    inside = trust_region_mask(poison(log_ratio, mask), advantages, mask, level=level, **EPSILONS)
    assert_close(inside * mask, expected, EXACT)


def test_trust_region_by_hand():
    """Ten small moves that a clip of each token passes are a move of a factor of 2.6 together."""
    log_ratio = torch.full((2, 10), 0.095)
    advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 10)
    mask = torch.ones(2, 10)
    kept = {
        level: trust_region_mask(log_ratio, advantages, mask, level=level, **EPSILONS)
        .expand(2, 10)
        .sum(dim=1)
        .tolist()
        for level in ("token", "prefix", "sequence")
    }
    # exp(0.095 t) is over 1.3 from the third token on. A negative advantage leads back, so it always trains.
    assert kept == {"token": [10, 10], "prefix": [2, 10], "sequence": [0, 10]}


def test_a_trust_region_without_a_lower_border():
    log_ratio, advantages, mask = torch.tensor([[-9.0, 9.0]]), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2)
    inside = trust_region_mask(log_ratio, advantages, mask, level="token", epsilon_low=1.0, epsilon_high=1.5)
    assert_close(inside, [[1.0, 0.0]], EXACT)
