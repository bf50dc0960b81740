"""Statistics of an evaluation have the values that are computed by hand."""

import functools

import numpy as np
import pytest
from tolerances import FP64, assert_close

from rlhf_recipes.evaluation.statistics import (
    mean_gain,
    preference_metrics,
    preference_rate,
    swapped_preferences,
    win_rate,
)


def test_preference_metrics_by_hand():
    chosen, rejected = [2.0, 1.0, 0.0, 4.0], [1.0, 3.0, -3.0, 0.0]
    metrics = preference_metrics(chosen, rejected, [10, 20, 30, 40], [5, 30, 20, 20])
    assert metrics["accuracy"] == 0.75
    # |margins| 1, 2, 3, 4 in this order, of which the second pair is ranked wrongly
    assert [metrics[f"accuracy_margin_q{q}"] for q in (1, 2, 3, 4)] == [1.0, 0.0, 1.0, 1.0]
    assert metrics["score_mean"] == 1.0
    assert_close(metrics["score_std"], np.std([2, 1, 0, 4, 1, 3, -3, 0]), FP64)
    assert_close(metrics["length_correlation"], np.corrcoef([1, -2, 3, 4], [5, -10, 10, 20])[0, 1], FP64)


def test_calibration_error_is_the_gap_in_each_bin():
    """All margins are log 3: confidence 0.75, one bin; accuracy 0.5 leaves a gap of 0.25."""
    margin = np.log(3)
    metrics = preference_metrics([margin, 0.0], [0.0, margin], [1, 1], [1, 1])
    assert_close(metrics["calibration_error"], 0.25, FP64)


def test_a_calibrated_model_has_no_calibration_error():
    rng = np.random.default_rng(0)
    margin = rng.exponential(1.0, 200_000)
    correct = rng.random(margin.size) < 1 / (1 + np.exp(-margin))
    signed = np.where(correct, margin, -margin)
    zeros = np.zeros_like(signed)
    assert preference_metrics(signed, zeros, zeros, zeros)["calibration_error"] < 0.01


def test_lengths_that_do_not_differ_correlate_with_nothing():
    assert preference_metrics([1, 2], [0, 0], [3, 3], [3, 3])["length_correlation"] == 0.0


def test_win_rate_counts_ties_as_half():
    assert win_rate([1, 1, 0, 2], [0, 1, 1, 0])["win_rate"] == 0.625


def test_samples_of_one_prompt_are_not_independent():
    """Fifty copies of each outcome give the same interval as one."""
    scores = np.r_[np.ones(12), np.zeros(8)]
    once = win_rate(scores, 1 - scores)
    assert win_rate(np.repeat(scores[:, None], 50, 1), np.repeat(1 - scores[:, None], 50, 1)) == once


def test_win_rate_of_equal_outcomes_has_no_width():
    assert win_rate([1, 1], [0, 0]) == {"win_rate": 1.0, "win_rate_low": 1.0, "win_rate_high": 1.0}
    assert win_rate([1], [0])["win_rate_low"] == 1.0


def test_a_missing_score_is_no_loss():
    """Of three prompts one has no pair and one a single pair."""
    scores = [[np.nan, np.nan], [2.0, np.nan], [0.0, 0.0]]
    baseline = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    assert win_rate(scores, baseline)["win_rate"] == 0.5
    assert mean_gain(scores, baseline)["gain"] == 0.0
    assert np.isnan(win_rate([np.nan], [0.0])["win_rate"])


def test_the_interval_of_the_gain_is_the_normal_one_for_many_prompts():
    gains = np.random.default_rng(1).normal(0.3, 2.0, 2000)
    outcome = mean_gain(gains, np.zeros(2000))
    half_width = 1.96 * gains.std() / np.sqrt(2000)
    assert_close(outcome["gain"], gains.mean(), FP64)
    assert 0.9 * half_width < outcome["gain"] - outcome["gain_low"] < 1.1 * half_width
    assert 0.9 * half_width < outcome["gain_high"] - outcome["gain"] < 1.1 * half_width


@pytest.mark.parametrize("rate", [0.5, 0.6, 0.8])
def test_the_interval_covers_the_true_rate(rate):
    """100 prompts of different difficulty with two samples each: of 95 % intervals, 92 to 98 % hold the true rate."""
    rng, repeats, prompts = np.random.default_rng(int(rate * 10)), 2_000, 100

    @functools.cache  # prompts have no order, so the interval depends on these numbers alone
    def covers(won_once, won_twice):
        wins = np.zeros((prompts, 2))
        wins[: won_once + won_twice, 0] = wins[:won_twice, 1] = 1
        outcome = win_rate(wins, 0.5 * np.ones_like(wins))
        return outcome["win_rate_low"] <= rate <= outcome["win_rate_high"]

    chances = rng.beta(2 * rate, 2 * (1 - rate), (repeats, prompts))
    wins = rng.binomial(2, chances)
    covered = sum(map(covers, (wins == 1).sum(1), (wins == 2).sum(1)))
    assert 0.92 * repeats <= covered <= 0.98 * repeats


def test_a_preference_is_an_outcome():
    scores = np.random.default_rng(0).integers(0, 3, (50, 2)).astype(float)
    outcomes = (np.sign(scores - 1) + 1) / 2
    assert preference_rate(outcomes) == win_rate(scores, np.ones_like(scores))


def test_a_judge_is_asked_in_both_orders():
    def judge(prompts, completions_a, completions_b, topic):
        """Prefer the first place by 0.3, and an answer to the topic."""
        assert topic == ["x", "y"]
        pairs = zip(topic, completions_a, completions_b, strict=True)
        return [0.5 + 0.3 + 0.1 * (t in a) - 0.1 * (t in b) for t, a, b in pairs]

    preferences = swapped_preferences(judge, ["p", "q"], ["x", "x"], ["", "y"], topic=["x", "y"])
    assert_close(preferences, [0.6, 0.4], FP64)
