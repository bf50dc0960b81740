"""The calibration of margins: its bins, and an interval that holds the true error as often as it says."""

import math

import numpy as np
from tolerances import FP64, assert_close

from rlhf_recipes.evaluation import calibration
from rlhf_recipes.evaluation.calibration import calibration_interval, reliability
from rlhf_recipes.evaluation.statistics import preference_metrics, wilson_interval


def _margins(count, sharpness, seed):
    """Draw margins whose right order has the probability sigmoid(sharpness |margin|)."""
    rng = np.random.default_rng(seed)
    size = np.abs(rng.normal(0, 1.2, count))
    return np.where(rng.random(count) < 1 / (1 + np.exp(-sharpness * size)), size, -size)


def test_the_bins_give_the_calibration_error():
    margins = _margins(500, 0.5, 0)
    bins = reliability(margins)
    error = sum(each.pairs * abs(each.accuracy - each.confidence) for each in bins) / 500
    lengths = np.arange(500), np.arange(500)
    assert_close(error, preference_metrics(margins, np.zeros(500), *lengths)["calibration_error"], FP64)
    assert sum(each.pairs for each in bins) == 500
    assert all(each.low <= each.accuracy <= each.high for each in bins)


def test_the_interval_holds_the_true_error(monkeypatch):
    monkeypatch.setattr(calibration, "RESAMPLES", 300)
    large = _margins(400_000, 0.4, 99)
    error = preference_metrics(large, 0 * large, large, 0 * large)["calibration_error"]
    ends = [calibration_interval(_margins(400, 0.4, seed), range(400), seed=seed) for seed in range(40)]
    assert sum(low <= error <= high for low, high in ends) >= 34
    ends = [calibration_interval(_margins(400, 1.0, seed), range(400), seed=seed) for seed in range(40)]
    assert sum(low == 0 for low, _ in ends) >= 34, "without a true error, 0 is inside"


def test_pairs_of_one_row_are_drawn_together():
    margins = np.repeat(_margins(200, 0.0, 1), 4)  # a coin: the error is far from 0
    alone, together = (calibration_interval(margins, rows) for rows in (range(800), np.repeat(range(200), 4)))
    assert alone[0] > together[0] > 0
    assert together[1] - together[0] > 1.4 * (alone[1] - alone[0])


def test_wilson_by_hand():
    share, n, z = 0.8, 10, 1.959963984540054
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    ends = [(centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)]
    assert_close(wilson_interval(8, n), ends, FP64)
