"""Compare the margins of a reward model, read as probabilities, with the share of pairs that it ranks right."""

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from rlhf_recipes.evaluation.statistics import BATCH, calibration_bins, wilson_interval

RESAMPLES = 2_000


@dataclass(frozen=True)
class CalibrationBin:
    """Hold the pairs with about the same predicted probability.

    Args:
        confidence: Mean of `sigmoid(|r+ - r-|)`.
        accuracy: Share of the pairs that are ranked right.
        low: Lower end of its 95 % interval.
        high: Upper end.
        pairs: Number of pairs.
    """

    confidence: float
    accuracy: float
    low: float
    high: float
    pairs: int


def reliability(margins: ArrayLike) -> list[CalibrationBin]:
    """Return the bins that hold pairs, of ten equal ones over [0.5, 1], for a plot.

    Args:
        margins: Score of the chosen answer less that of the rejected one, `(N,)`.
    """
    confidence, correct = _predictions(margins)
    bins, found = calibration_bins(confidence), []
    for number in np.unique(bins):
        here = bins == number
        right, count = correct[here].sum(), int(here.sum())
        ends = wilson_interval(right, count)
        found.append(CalibrationBin(float(confidence[here].mean()), float(right / count), *ends, count))
    return found


def calibration_interval(margins: ArrayLike, rows: ArrayLike, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the calibration error of `preference_metrics`, by a bootstrap over rows.

    By chance the error e of a sample is above the true one, and a resample adds about as much again. With mean m and
    deviation s of the resampled errors, the interval is `2 e - m +- 1.96 sqrt(s^2 + (m - e)^2)`: the correction of the
    chance is uncertain itself. It is cut at 0. The lower end is 0 too if a model without error would reach e in more
    than 5 % of samples.

    Args:
        margins: `(N,)`; see `reliability`.
        rows: Row of each pair. The pairs of a row are drawn together.
        seed: Seed.

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application" (correction of a bias). Differs: adds
    the square of the correction. Without it, 88 to 94 % of intervals held the true error in a simulation with 200 to
    3,000 pairs, with it 93 to 98 %.
    """
    gaps, counts = _gaps(margins, rows)
    size, error = len(counts), np.abs(gaps.sum(axis=0)).sum() / counts.sum()
    if size < 2:
        return math.nan, math.nan

    def resampled(indices: np.ndarray, axis: int = -1) -> np.ndarray:
        drawn = indices.astype(int)
        found: np.ndarray = np.abs(gaps[drawn].sum(axis=-2)).sum(axis=-1) / counts[drawn].sum(axis=-1)
        return found

    errors = scipy.stats.bootstrap(
        (np.arange(size),),
        resampled,
        n_resamples=RESAMPLES,
        method="basic",
        batch=max(1, BATCH // (size * gaps.shape[1])),
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    chance = np.random.default_rng(seed).normal(size=(RESAMPLES, gaps.shape[1])) * np.sqrt((gaps**2).sum(axis=0))
    is_by_chance = np.quantile(np.abs(chance).sum(axis=1) / counts.sum(), 0.95) >= error
    bias = errors.mean() - error
    half = float(scipy.stats.norm.ppf(0.975) * math.hypot(errors.std(), bias))
    return 0.0 if is_by_chance else max(error - bias - half, 0.0), max(error - bias + half, 0.0)


def _predictions(margins: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(margins, dtype=float)
    return 1 / (1 + np.exp(-np.abs(values))), (values > 0).astype(float)


def _gaps(margins: ArrayLike, rows: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the sum of right less predicted in each bin, `(R, 10)`, and its number of pairs, `(R,)`."""
    confidence, correct = _predictions(margins)
    _, row = np.unique(np.asarray(rows), return_inverse=True)
    gaps = np.zeros((row.max() + 1, 10))
    np.add.at(gaps, (row, calibration_bins(confidence)), correct - confidence)
    return gaps, np.bincount(row).astype(float)
