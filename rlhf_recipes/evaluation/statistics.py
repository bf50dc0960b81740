"""Measure how well a reward model ranks, and which of two policies is better."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # it imports `scipy.stats`, which takes a second, at the first call
from numpy.typing import ArrayLike

Samples = ArrayLike | Sequence[Sequence[float | None]]
BATCH = 2**24  # numbers that a bootstrap holds at a time, 128 MiB


def preference_metrics(
    chosen_scores: ArrayLike, rejected_scores: ArrayLike, chosen_lengths: ArrayLike, rejected_lengths: ArrayLike
) -> dict[str, float]:
    """Return metrics that show more about a reward model than its accuracy.

    accuracy: share of pairs in the labelled order.
    accuracy_margin_q1..q4: accuracy in each quartile of the predicted margin |r+ - r-|. It should rise.
    calibration_error: expected calibration error of sigmoid(|r+ - r-|) as the probability of the right order, in ten
    equal bins over [0.5, 1].
    length_correlation: Pearson correlation over pairs of the difference in score with the difference in length, in
    which the shared prompt cancels. Near 1, the model rewards length.
    Also the mean and population standard deviation of the scores: chosen, rejected, and both.

    Args:
        chosen_scores: `(N,)`.
        rejected_scores: `(N,)`.
        chosen_lengths: `(N,)`, tokens, with or without the prompt.
        rejected_lengths: `(N,)`, tokens, counted in the same way.

    Source: Guo et al. 2017, arXiv:1706.04599, eq. 3 (calibration error).
    """
    chosen, rejected = np.asarray(chosen_scores, dtype=float), np.asarray(rejected_scores, dtype=float)
    margin, correct = np.abs(chosen - rejected), (chosen > rejected).astype(float)
    scores = np.concatenate([chosen, rejected])
    length_gap = np.asarray(chosen_lengths, dtype=float) - np.asarray(rejected_lengths, dtype=float)
    varies = (chosen - rejected).std() > 0 and length_gap.std() > 0
    metrics = {
        "accuracy": correct.mean(),
        "calibration_error": calibration_error(1 / (1 + np.exp(-margin)), correct),
        "length_correlation": scipy.stats.pearsonr(chosen - rejected, length_gap).statistic if varies else 0.0,
        "chosen_score_mean": chosen.mean(),
        "chosen_score_std": chosen.std(),
        "rejected_score_mean": rejected.mean(),
        "rejected_score_std": rejected.std(),
        "score_mean": scores.mean(),
        "score_std": scores.std(),
    }
    for number, quartile in enumerate(np.array_split(np.argsort(margin, kind="stable"), 4), start=1):
        if quartile.size:
            metrics[f"accuracy_margin_q{number}"] = correct[quartile].mean()
    return {name: float(value) for name, value in metrics.items()}


def head_metrics(chosen_scores: ArrayLike, rejected_scores: ArrayLike) -> dict[str, float]:
    """Return how far the heads of a reward model disagree, and whether it is more often wrong where they do.

    disagreement: mean over all responses of the standard deviation over the heads, from a common origin: without the
        constant that preferences leave free, each head has the same mean.
    margin_disagreement: mean over pairs of the standard deviation of r+ - r- over the heads.
    unanimous: share of pairs that all heads rank alike.
    accuracy_unanimous, accuracy_divided: share of these pairs, and of the others, that their mean ranks as labelled.

    Args:
        chosen_scores: `(N, K)`, K > 1.
        rejected_scores: `(N, K)`.
    """
    chosen, rejected = np.asarray(chosen_scores, dtype=float), np.asarray(rejected_scores, dtype=float)
    margins, responses = chosen - rejected, np.concatenate([chosen, rejected])
    correct, alike = margins.mean(axis=1) > 0, np.abs(np.sign(margins).sum(axis=1)) == margins.shape[1]
    metrics = {
        "disagreement": (responses - responses.mean(axis=0)).std(axis=1, ddof=1).mean(),
        "margin_disagreement": margins.std(axis=1, ddof=1).mean(),
        "unanimous": alike.mean(),
    }
    for name, pairs in (("unanimous", alike), ("divided", ~alike)):
        if pairs.any():
            metrics[f"accuracy_{name}"] = correct[pairs].mean()
    return {name: float(value) for name, value in metrics.items()}


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error of confidences in [0.5, 1], see `preference_metrics`."""
    bins = calibration_bins(confidence)
    gaps = [abs((correct - confidence)[bins == b].sum()) for b in range(10)]
    return float(sum(gaps) / confidence.size)


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """Return which of ten equal bins over [0.5, 1] holds each confidence: 0 to 9."""
    return np.minimum(((confidence - 0.5) * 20).astype(int), 9)


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, after Wilson. A number of successes that is not whole is rounded.

    Args:
        successes: In [0, `count`].
        count: Trials, at least one.
    """
    bounds = scipy.stats.binomtest(round(successes), count).proportion_ci(method="wilson")
    return float(bounds.low), float(bounds.high)


def compare_scores(scores: Samples, baseline_scores: Samples, *, seed: int = 0) -> dict[str, float]:
    """Return the mean score of a policy and of its baseline, and `win_rate` and `mean_gain` with their intervals.

    Args:
        scores: Scores of the policy, `(N, S)`: S samples of each of N prompts. `None` or NaN is a missing score.
        baseline_scores: Scores of the baseline on the same prompts, same shape.
        seed: Seed of the bootstrap.
    """
    ours, theirs = np.asarray(scores, dtype=float), np.asarray(baseline_scores, dtype=float)
    means = {"policy": _mean(ours), "baseline": _mean(theirs)}
    return means | win_rate(ours, theirs, seed=seed) | mean_gain(ours, theirs, seed=seed)


def _mean(scores: np.ndarray) -> float:
    return float(np.nanmean(scores)) if np.isfinite(scores).any() else math.nan


def win_rate(scores: ArrayLike, baseline_scores: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Return the share of prompts on which a policy beats the baseline, with a 95 % bootstrap interval over prompts.

    A tie counts as half a win. A pair without two finite scores does not count. Samples of the same prompt are not
    independent, so they are averaged first. If every prompt is won, or every one is lost, the bootstrap shows no
    spread. The interval is then the exact one of Clopper and Pearson. If every prompt is a tie, it has width 0.

    Args:
        scores: One score per prompt, `(N,)`, or one per sample, `(N, S)`.
        baseline_scores: Scores of the baseline on the same prompts, same shape.
        seed: Seed of the bootstrap.
    """
    return _rate_with_interval(_outcomes(scores, baseline_scores), seed)


def mean_gain(scores: ArrayLike, baseline_scores: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Return the mean of score minus baseline score, with an interval. The arguments are those of `win_rate`."""
    return _mean_with_interval("gain", _differences(scores, baseline_scores), seed)


@dataclass(frozen=True)
class CrossedMean:
    """A mean, its 95 % interval, and the share of the variance that each axis brings.

    Without an interval, `low`, `high` and the shares are NaN.
    """

    mean: float
    low: float
    high: float
    shares: tuple[float, ...]

    def excludes(self, value: float) -> bool:
        """Return whether the interval is there and does not hold a value. Without width it shows nothing."""
        return self.low < self.high and not self.low <= value <= self.high


def crossed_mean(values: ArrayLike) -> CrossedMean:
    """Return the mean of values that several random factors cross, with a 95 % interval over all of them.

    Each axis is one factor, for example the runs of a group, the runs of another group, and the prompts. Let s_i^2 be
    the sample variance of the n_i means along axis i, and `v_i = s_i^2 / n_i`:
    `variance = sum_i v_i`, `df = variance^2 / sum_i (v_i^2 / (n_i - 1))`, `interval = mean +- t(df) sqrt(variance)`.

    For one axis this is the t interval of a mean. For the differences `a_i - b_j` it is the interval of Welch's test.
    Effects that belong to two factors together count in both terms, so the interval is rather too wide. A bootstrap
    over two or three runs is far too narrow, because it draws from these runs alone. An axis with one value has no
    variance, so there is no interval: one seed shows nothing about other seeds.

    Args:
        values: Finite numbers, at least one axis, no empty one.

    Source: Satterthwaite 1946, "An approximate distribution of estimates of variance components".
    """
    values = np.asarray(values, dtype=float)
    others = [tuple(axis for axis in range(values.ndim) if axis != kept) for kept in range(values.ndim)]
    return _over_factors(values, [_variance(values.mean(axis=axes)) for axes in others], values.shape)


def _over_factors(values: np.ndarray, variances: list[float], sizes: tuple[int, ...]) -> CrossedMean:
    """Return the interval of a mean from the variance between the levels of each factor, and their numbers."""
    mean = float(values.mean())
    if min(sizes) < 2:
        return CrossedMean(mean, math.nan, math.nan, (math.nan,) * len(sizes))
    terms = np.array(variances) / sizes
    variance = terms.sum()
    if variance == 0:
        return CrossedMean(mean, mean, mean, (0.0,) * len(terms))
    freedom = variance**2 / (terms**2 / (np.array(sizes) - 1)).sum()
    half = float(scipy.stats.t.ppf(0.975, freedom) * math.sqrt(variance))
    return CrossedMean(mean, mean - half, mean + half, tuple(float(share) for share in terms / variance))


def share_between(wins: ArrayLike, num_ours: int) -> CrossedMean:
    """Return the share that some runs win against the others, with a 95 % interval over both and over prompts.

    Near 0 and 1 the wins between two groups hide how far the runs of one group lie apart. So the variance between the
    runs of a group is that of their wins against all other runs, of both groups. The difference of the means of these
    is the share less a half, so the interval is that of Welch's test on ranks. The variance over prompts counts one
    more prompt that is won and one that is lost. So prompts that all agree leave an interval with a width.

    Args:
        wins: Wins of each run against each, ours first, `(R, R, N)` over N prompts, with 0.5 against itself.
        num_ours: Number of our runs.
    """
    wins = np.asarray(wins, dtype=float)
    between, strengths = wins[:num_ours, num_ours:], wins.mean(axis=(1, 2))
    groups = (strengths[:num_ours], strengths[num_ours:])
    variances = [*map(_variance, groups), _variance_over_prompts(between.mean(axis=(0, 1)))]
    return _over_factors(between, variances, (num_ours, len(wins) - num_ours, wins.shape[2]))


def share_over_baseline(wins: ArrayLike) -> CrossedMean:
    """Return the share that runs win, each against its own baseline, with a 95 % interval over runs and prompts.

    Args:
        wins: Wins of each run, `(R, N)` over N prompts.
    """
    wins = np.asarray(wins, dtype=float)
    variances = [_variance(wins.mean(axis=1)), _variance_over_prompts(wins.mean(axis=0))]
    return _over_factors(wins, variances, wins.shape)


def _variance_over_prompts(shares: np.ndarray) -> float:
    return _variance(np.append(shares, (0.0, 1.0)))


def _variance(means: np.ndarray) -> float:
    """Return the sample variance; NaN of one value."""
    return float(means.var(ddof=1)) if len(means) > 1 else math.nan


def wins_per_prompt(scores: Samples, rival_scores: Samples) -> np.ndarray:
    """Return for each prompt the share of samples that beat the rival's, `(N,)`. A tie counts half. No pair is NaN.

    Args:
        scores: Scores, `(N, S)`. `None` or NaN is a missing score.
        rival_scores: Scores of the rival on the same prompts, same shape.
    """
    outcomes: np.ndarray = _outcomes(scores, rival_scores).mean(axis=1).filled(math.nan)
    return outcomes


def preference_rate(preferences: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Return the win rate from preferences between pairs of answers instead of scores.

    Args:
        preferences: Probability that the policy's answer is better, `(N,)` or `(N, S)`, in [0, 1].
        seed: Seed of the bootstrap.
    """
    return _rate_with_interval(_by_prompt(np.asarray(preferences, dtype=float)), seed)


def swapped_preferences(
    judge: Callable[..., list[float]], prompts: list[Any], ours: list[Any], theirs: list[Any], **columns: list[Any]
) -> list[float]:
    """Ask a judge of pairs twice, with the answers in both orders, and return the mean: a bias for one place cancels.

    Args:
        judge: Function of `prompts`, `completions_a`, `completions_b` and the other columns of the dataset, all passed
            by name. It returns for each prompt the probability, in [0, 1], that `a` is the better answer.
        prompts: Text or messages.
        ours: Answers whose probability to be better is returned.
        theirs: Answers to compare with.
        columns: Other columns of the dataset.

    Source: Zheng et al. 2023, arXiv:2306.05685, section 3.4.
    """
    first = judge(prompts=prompts, completions_a=ours, completions_b=theirs, **columns)
    second = judge(prompts=prompts, completions_a=theirs, completions_b=ours, **columns)
    return [(a + 1 - b) / 2 for a, b in zip(first, second, strict=True)]


def _outcomes(scores: Samples, baseline_scores: Samples) -> np.ma.MaskedArray:
    """Return 1 for a win, 0.5 for a tie and 0 for a loss, `(N, S)`. A missing score masks its pair."""
    return (np.sign(_differences(scores, baseline_scores)) + 1) / 2


def _differences(scores: Samples, baseline_scores: Samples) -> np.ma.MaskedArray:
    """Return the differences, `(N, S)`. A missing score masks its pair."""
    return _by_prompt(np.asarray(scores, dtype=float) - np.asarray(baseline_scores, dtype=float))


def _by_prompt(samples: np.ndarray) -> np.ma.MaskedArray:
    """Return `(N, S)` for `(N,)` or `(N, S)`, with a mask where a value is not finite."""
    return np.ma.masked_invalid(samples.reshape(len(samples), -1))


def _rate_with_interval(outcomes: np.ma.MaskedArray, seed: int) -> dict[str, float]:
    rate, count = _mean_with_interval("win_rate", outcomes, seed), int(outcomes.mean(axis=1).count())
    if rate["win_rate"] not in (0, 1):
        return rate
    exact = scipy.stats.binomtest(round(rate["win_rate"] * count), count).proportion_ci(method="exact")
    return rate | {"win_rate_low": float(exact.low), "win_rate_high": float(exact.high)}


def _mean_with_interval(name: str, samples: np.ma.MaskedArray, seed: int) -> dict[str, float]:
    values = np.ma.compressed(samples.mean(axis=1))
    mean = low = high = float(values.mean()) if values.size else math.nan
    if values.size > 1 and values.std() > 0:
        interval = scipy.stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=0.95,
            method="percentile",
            batch=max(1, BATCH // values.size),  # changes no number
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
