"""Curves of several runs have the values that are computed by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from tolerances import EXACT, FP64, assert_close

from rlhf_recipes.comparison.curves import (
    best_score_within,
    frontier_path,
    leaders,
    over_samples,
    seed_band,
    smooth,
    stretches,
)
from rlhf_recipes.evaluation.alarms import finite


def _path(*points):
    return pd.DataFrame(points, columns=["kl", "score"], dtype=float)


def test_a_short_curve_is_not_smoothed():
    curve = pd.Series([1.0, 5.0, 2.0], index=[10, 20, 30])
    assert_close(smooth(curve).to_numpy().tolist(), [1.0, 5.0, 2.0], EXACT)


def test_smoothing_averages_a_tenth_of_the_run():
    """A spike of 3 in 30 points is spread over 3 points. No other point changes."""
    curve = pd.Series(np.eye(30)[10] * 3)
    expected = np.zeros(30)
    expected[9:12] = 1.0
    assert_close(smooth(curve).to_numpy().tolist(), expected, EXACT)


def test_smoothing_leaves_out_what_is_no_number():
    curve = pd.Series([1.0, math.nan, 3.0, math.inf])
    assert list(smooth(curve).index) == [0, 2]
    assert finite(pd.Series([math.nan])).empty


def test_samples_replace_steps():
    """Two steps on one rollout are one point. A step without a count gets one between its neighbours."""
    curve = pd.Series([1.0, 3.0, 5.0, 7.0], index=[1, 2, 3, 4])
    samples = pd.Series([64.0, 64.0, math.nan, 128.0], index=[1, 2, 3, 4])
    result = over_samples(curve, samples)
    assert_close(result.index.to_numpy().tolist(), [64.0, 96.0, 128.0], EXACT)
    assert_close(result.to_numpy().tolist(), [2.0, 5.0, 7.0], EXACT)


def test_the_band_covers_what_every_seed_has_reached():
    short = pd.Series([0.0, 2.0], index=[0, 2])
    long = pd.Series([1.0, 1.0, 4.0], index=[1, 2, 5])
    band = seed_band([short, long, pd.Series(dtype=float)])
    assert list(band.index) == [1.0, 2.0]
    assert_close(band["mean"].to_numpy().tolist(), [1.0, 1.5], EXACT)
    assert_close(band["low"].to_numpy().tolist(), [1.0, 1.0], EXACT)
    assert_close(band["high"].to_numpy().tolist(), [1.0, 2.0], EXACT)


def test_a_band_without_curves_is_empty():
    assert seed_band([]).empty
    disjoint = seed_band([pd.Series([0.0, 1.0], index=[0, 1]), pd.Series([0.0, 1.0], index=[5, 6])])
    assert disjoint.empty


def test_a_path_needs_both_numbers_and_keeps_the_order_of_training():
    kl = pd.Series([0.0, 4.0, math.nan, 2.0], index=[1, 2, 3, 4])
    scores = pd.Series([0.5, 1.0, 2.0, 3.0], index=[1, 2, 3, 4])
    path = frontier_path(kl, scores)
    assert list(path.index) == [1, 2, 4]
    assert_close(path.to_numpy().tolist(), [[0.0, 0.5], [4.0, 1.0], [2.0, 3.0]], EXACT)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.0, 0.0),  # the start alone
        (1.0, 1.0),  # on the way from (0, 0) to (2, 2)
        (3.0, 2.5),  # on the way to (4, 3)
        (4.0, 3.0),
        (9.0, 3.0),
    ],
)
def test_the_score_at_a_kl_is_interpolated(limit, expected):
    assert_close(float(best_score_within(_path((0, 0), (2, 2), (4, 3)), limit)), expected, FP64)


def test_a_kl_that_comes_back_counts():
    """The controller brings the run from 6 back to 2 nats. Its score there is higher than the first time."""
    assert best_score_within(_path((0, 0), (6, 3), (2, 5)), 2.0) == 5.0


def test_a_score_that_falls_with_the_kl_keeps_its_best():
    assert best_score_within(_path((0, 0), (2, 3), (4, 1)), 4.0) == 3.0


def test_many_limits_are_one_call():
    path = _path((0, 0), (2, 2), (4, 3))
    found = best_score_within(path, [0.0, 1.0, 3.0, 9.0])
    assert_close(found.tolist(), [0.0, 1.0, 2.5, 3.0], FP64)


def test_a_path_above_the_limit_has_no_score():
    assert math.isnan(best_score_within(_path((3, 1), (4, 2)), 2.0))
    assert math.isnan(best_score_within(_path(), 2.0))


def test_the_leader_within_each_kl_by_hand():
    """B has no score at the first limit. Equal scores lead together. Where nobody has a score, nobody leads."""
    nan = math.nan
    scores = np.array([[0.0, 1.0, 2.0, nan], [nan, 2.0, 2.0, nan]])
    assert leaders(scores).tolist() == [[True, False, True, False], [False, True, True, False]]


def test_stretches_are_cut_where_another_leads():
    kl = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert stretches(kl, np.array([True, True, False, False, True])) == [(0.0, 1.0), (4.0, 4.0)]
    assert stretches(kl, np.zeros(5, dtype=bool)) == []
