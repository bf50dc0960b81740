"""Scores of several heads as one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP64, assert_close

from rlhf_recipes.algorithm.heads import centred, combine_heads, disagreement

SCORES = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]], dtype=torch.float64)


def test_the_rules_by_hand():
    assert combine_heads(SCORES).tolist() == [2.0, 2.0]
    assert combine_heads(SCORES, "pessimistic", 0.5).tolist() == [1.5, 2.0]  # the deviation of 1, 2, 3 is 1
    soft = -0.5 * math.log((math.exp(-2) + math.exp(-4) + math.exp(-6)) / 3)
    assert_close(combine_heads(SCORES, "soft_min", 0.5), [soft, 2.0], FP64)
    assert disagreement(SCORES).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rule", ["mean", "pessimistic", "soft_min"])
def test_one_head_is_its_score(rule):
    scores = torch.tensor([[0.3], [-4.0]], dtype=torch.float64)
    assert_close(combine_heads(scores, rule, 0.7), [0.3, -4.0], FP64)
    assert disagreement(scores).tolist() == [0.0, 0.0]


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(-9, 9))
def test_a_pessimistic_score_is_at_most_the_mean_and_moves_with_all_heads(heads, shift):
    scores = torch.tensor([heads], dtype=torch.float64)
    for rule in ("pessimistic", "soft_min"):
        combined = combine_heads(scores, rule)
        assert combined <= scores.mean() + FP64["atol"]
        assert_close(combine_heads(scores + shift, rule), combined + shift, FP64)


def test_the_coefficient_of_soft_min_leads_from_the_minimum_to_the_mean():
    low, high = (combine_heads(SCORES[0], "soft_min", coef) for coef in (1e-3, 1e4))
    assert_close(low, 1 + 1e-3 * math.log(3), FP64)  # the other two heads are e^-1000 beside the lowest
    assert_close(high, 2 - 2 / 3 / 2e4, FP64)  # mean minus half the variance over the coefficient


def test_a_constant_of_a_head_is_no_disagreement_and_does_not_move_the_mean():
    constants = torch.tensor([5.0, -1.0, 0.0], dtype=torch.float64)
    moved = SCORES + constants
    both = centred(moved, moved.mean(dim=0)), centred(SCORES, SCORES.mean(dim=0))
    assert_close(disagreement(both[0]), disagreement(both[1]), FP64)
    assert_close(both[0].mean(dim=-1), moved.mean(dim=-1), FP64)
