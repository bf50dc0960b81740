"""Preference as reward: a probability, by hand and by its properties."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import FP64, assert_close

from rlhf_recipes.algorithm.par import preference_as_reward

NAN = math.nan


def _par(scores, references):
    return preference_as_reward(*(torch.tensor(x, dtype=torch.float64) for x in (scores, references)))


def test_it_is_the_mean_probability_by_hand():
    first = (1 / (1 + math.exp(-1.5)) + 1 / (1 + math.exp(0.5))) / 2  # 1.5 above one reference, 0.5 below the other
    assert_close(_par([2.0, 0.0], [[0.5, 2.5], [0.0, 0.0]]), [first, 0.5], FP64)


def test_an_answer_without_a_score_has_none_and_a_reference_without_one_does_not_count():
    found = _par([1.0, NAN, 1.0], [[1.0, NAN], [1.0, 1.0], [NAN, NAN]])
    assert found[0] == 0.5
    assert found[1:].isnan().all()


@given(st.floats(-30, 30), st.lists(st.floats(-30, 30), min_size=1, max_size=4), st.floats(-9, 9))
def test_it_is_bounded_rises_with_the_score_and_has_no_level(score, references, level):
    reward = _par([score], [references])
    assert 0 <= reward <= 1
    assert _par([score + 1], [references]) >= reward
    assert_close(_par([score + level], [[x + level for x in references]]), reward, FP64)
