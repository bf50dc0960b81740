"""Statistics of an evaluation have the values that are computed by hand."""

import functools

import numpy as np
import pytest
import scipy.stats
from tolerances import FP64, assert_close

from rlhf_recipes.evaluation.statistics import (
    crossed_mean,
    mean_gain,
    preference_metrics,
    preference_rate,
    share_between,
    share_over_baseline,
    swapped_preferences,
    win_rate,
    wins_per_prompt,
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


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_win_rate_of_equal_outcomes_has_an_exact_interval(rate):
    """Of n wins out of n, the lower end is the rate that wins n times with probability 0.025."""
    for count in (1, 2, 6):
        end = 0.025 ** (1 / count)
        outcome = win_rate([rate] * count, [1 - rate] * count)
        low, high = (end, 1.0) if rate else (0.0, 1 - end)
        assert_close(list(outcome.values()), [rate, low, high], FP64)
        assert preference_rate([rate] * count) == outcome


def test_a_win_rate_of_ties_has_no_width():
    assert win_rate([1, 1], [1, 1]) == {"win_rate": 0.5, "win_rate_low": 0.5, "win_rate_high": 0.5}


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
    rng, repeats, prompts = np.random.default_rng(int(rate * 10)), 1_000, 100

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


def _same_interval(found, oracle):
    assert_close([found.low, found.high], [oracle.low, oracle.high], FP64)


def test_a_crossed_mean_of_one_factor_is_the_t_interval():
    values = np.random.default_rng(0).normal(1.0, 2.0, 7)
    _same_interval(crossed_mean(values), scipy.stats.ttest_1samp(values, 0).confidence_interval())


def test_a_crossed_mean_of_differences_is_the_interval_of_welch():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(1.0, 2.0, 3), rng.normal(0.0, 0.5, 5)
    found = crossed_mean(ours[:, None] - theirs)
    _same_interval(found, scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval())
    terms = np.array([ours.var(ddof=1) / 3, theirs.var(ddof=1) / 5])
    assert_close(list(found.shares), (terms / terms.sum()).tolist(), FP64)


def test_a_crossed_mean_by_hand():
    """Row means 1 and 3, column means 1.5 and 2.5: variances 2/2 and 0.5/2; df = 1.25^2 / (1 + 0.0625)."""
    found = crossed_mean([[0.5, 1.5], [2.5, 3.5]])
    half = scipy.stats.t.ppf(0.975, 1.25**2 / 1.0625) * np.sqrt(1.25)
    assert_close([found.mean, found.low, found.high], [2.0, 2.0 - half, 2.0 + half], FP64)
    assert_close(list(found.shares), [0.8, 0.2], FP64)


def test_the_order_of_levels_and_factors_changes_no_crossed_mean():
    values = np.random.default_rng(2).random((3, 4, 5))
    one, other = crossed_mean(values), crossed_mean(values[::-1, [2, 0, 3, 1]].transpose(2, 0, 1))
    assert_close([one.mean, one.low, one.high], [other.mean, other.low, other.high], FP64)


def test_one_seed_has_no_interval():
    found = crossed_mean(np.random.default_rng(3).random((1, 4, 50)))
    assert np.isnan([found.low, found.high, *found.shares]).all()
    assert not found.excludes(100.0)


def test_equal_values_have_no_width():
    found = crossed_mean(np.ones((2, 3)))
    assert (found.low, found.high) == (1.0, 1.0)
    assert not found.excludes(0.5), "nothing is known about the factors"


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_few_seeds_seldom_separate_equal_groups(runs):
    """Both groups come from one distribution, with large effects of seeds. A bootstrap over two seeds errs in 27 %."""
    rng, wrong = np.random.default_rng(runs), 0
    for _ in range(200):
        ours, theirs = (rng.normal(0, 1, (runs, 1)) + rng.normal(0, 1, (runs, 40)) for _ in range(2))
        wrong += crossed_mean((np.sign(ours[:, None] - theirs) + 1) / 2).excludes(0.5)
    assert 0 < wrong / 200 < 0.12


@pytest.mark.parametrize("runs", [2, 3])
@pytest.mark.parametrize("deviation", [0.3, 4.0])
def test_few_seeds_seldom_beat_equal_groups(runs, deviation):
    """Large effects of seeds decide all prompts alike. The wins alone then separate two seeds of each in 21 %."""
    rng, wrong = np.random.default_rng(runs), 0
    for _ in range(300):
        scores = rng.normal(0, deviation, (2 * runs, 1)) + rng.normal(0, 1, (2 * runs, 80))
        wrong += share_between((np.sign(scores[:, None] - scores) + 1) / 2, runs).excludes(0.5)
    assert wrong / 300 < 0.09


def test_a_share_by_hand():
    """Runs 0 and 1 beat runs 2 and 3 on both prompts, and 0 beats 1: means 3.5, 2.5, 1.5 and 0.5 of 4."""
    scores = np.array([[3, 3], [2, 2], [1, 1], [0, 0]])
    found = share_between((np.sign(scores[:, None] - scores) + 1) / 2, 2)
    seeds, prompts = np.var([3.5, 2.5], ddof=1) / 16 / 2, np.var([1, 1, 0, 1], ddof=1) / 2
    variance = 2 * seeds + prompts
    half = scipy.stats.t.ppf(0.975, variance**2 / (2 * seeds**2 + prompts**2)) * np.sqrt(variance)
    assert_close([found.mean, found.low, found.high], [1.0, 1.0 - half, 1.0 + half], FP64)
    alone = share_over_baseline(np.ones((2, 2)))
    assert_close([alone.mean, alone.low], [1.0, 1 - scipy.stats.t.ppf(0.975, 1) * np.sqrt(prompts)], FP64)


def test_wins_of_each_prompt():
    """The first prompt is won in one sample and tied in the other. The second is lost. The third has no pair."""
    wins = wins_per_prompt([[2.0, 1.0], [0.0, np.nan], [np.nan, 1.0]], [[1.0, 1.0], [1.0, 0.0], [0.0, np.nan]])
    assert_close(wins.tolist()[:2], [0.75, 0.0], FP64)
    assert np.isnan(wins[2])
